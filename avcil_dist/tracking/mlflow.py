"""A stream in MLflow: one parent run for the stream, one child run for each step.

One process of a job talks to the server (rank 0). Everything goes through `MlflowClient`; MLflow's
own notion of a current run is never used, so two streams in one process do not meet.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

# Read while MLflow is imported. What the user has set stays.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# MLflow's own seven retries take minutes, in which all ranks wait for the one that talks to the server.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH
from sqlalchemy.exc import SQLAlchemyError

from avcil_dist.config import TrackingConfig
from avcil_dist.errors import ArtifactError, ConfigError, TrackingError
from avcil_dist.training.metrics import StreamMetrics

STEP_TAG = "avcil.step"
SQLITE = "sqlite:///"
COMMIT_FILE = "COMMITTED.json"
LOCK_SECONDS = 300

Status = Literal["FINISHED", "FAILED", "KILLED"]

logging.getLogger("alembic").setLevel(logging.WARNING)


def tracking_uri(tracking: TrackingConfig, output: str) -> str:
    """Where the runs are kept: as configured, else a sqlite database in the output folder.

    Raises ConfigError when the output folder is on object storage, where no database can be.
    """
    return tracking.uri or f"{SQLITE}{_local_folder(output) / 'mlflow.db'}"


def open_stream(
    tracking: TrackingConfig,
    *,
    output: str,
    name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None,
) -> str:
    """Make the stream run, or open it again when `run_id` is known to the server; returns its id.

    Parameters are logged once, however often the stream is opened. Raises TrackingError when the
    server does not answer.
    """
    uri = tracking_uri(tracking, output)
    with _reported(uri):
        client = _connect(uri)
        known = run_id if run_id is not None and _knows(client, run_id) else None
        if known is None:
            known = client.create_run(_experiment(client, uri, tracking, output), run_name=name).info.run_id
        else:
            client.update_run(known, status="RUNNING")
        held = client.get_run(known).data.params  # a start that was cut off may have logged some, or none
        missing = [
            Param(key, str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in parameters.items() if key not in held
        ]
        for first in range(0, len(missing), MAX_PARAMS_TAGS_PER_BATCH):
            client.log_batch(known, params=missing[first : first + MAX_PARAMS_TAGS_PER_BATCH])
        client.log_batch(known, tags=[RunTag(key, value) for key, value in tags.items()])
        return str(known)


def close_stream(tracking: TrackingConfig, *, output: str, stream_run: str, status: Status) -> None:
    """End the stream run. Raises TrackingError when the server does not answer."""
    uri = tracking_uri(tracking, output)
    with _reported(uri):
        _connect(uri).set_terminated(stream_run, status)


class StepTracker:
    """One step's run, child of the stream run, as a context manager.

    A run that an earlier attempt at this step left behind is continued. Leaving ends the run:
    FINISHED, FAILED on an exception, KILLED on an interrupt or SystemExit. Every method raises
    TrackingError when the server does not answer.
    """

    run_id: str

    def __init__(self, tracking: TrackingConfig, *, output: str, stream_run: str, step: int) -> None:
        self.uri = tracking_uri(tracking, output)
        self.stream_run = stream_run
        self.step = step
        self.name = f"step_{step:03d}"
        self._held: dict[tuple[str, str], set[int]] = {}
        self._known: dict[str, set[str]] = {}

    def __enter__(self) -> Self:
        with _reported(self.uri):
            self._client = _connect(self.uri)
            self.run_id = self._step_run()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            status: Status = "FINISHED"
        else:
            status = "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"
        # What stopped the step matters more than that the server could not be told of it.
        with suppress(TrackingError) if kind else nullcontext(), _reported(self.uri):
            self._client.set_terminated(self.run_id, status)

    def metrics(self, values: Mapping[str, float], position: int) -> None:
        """Log numbers of the step run at MLflow's step `position`; a position that is held already stays as it is."""
        with _reported(self.uri):
            self._log(self.run_id, values, position)

    def stream_metrics(self, metrics: StreamMetrics) -> None:
        """Log the stream's numbers at the incremental step, to the stream run; tasks' and classes' to the step run.

        The confusion matrix is in the artifact's metrics.json.
        """
        values = {"seen_accuracy": metrics.seen_accuracy[-1], "mean_accuracy": metrics.mean_accuracy}
        if metrics.average_forgetting is not None:
            values |= {"forgetting": metrics.forgetting[-1], "average_forgetting": metrics.average_forgetting}
        if metrics.source_disjoint is not None:
            values["source_disjoint_accuracy"] = metrics.source_disjoint.seen_accuracy[-1]
        tasks = {f"accuracy_task_{task}": accuracy for task, accuracy in enumerate(metrics.accuracy[-1])}
        classes = {f"accuracy_class/{_as_key(name)}": value for name, value in metrics.per_class.items()}
        with _reported(self.uri):
            self._log(self.stream_run, values, metrics.step)
            self._log(self.run_id, tasks | classes, metrics.step)

    def artifact(self, folder: str) -> None:
        """Upload a local step artifact to the step run, under `step_003`. Raises ArtifactError for an empty folder."""
        root = Path(folder)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if not files:
            raise ArtifactError(f"{folder}: no files to upload; give the folder of a committed step artifact")
        # The commit record goes last: an upload that is cut off leaves an artifact that does not count.
        files.sort(key=lambda path: path.name == COMMIT_FILE)
        with _reported(self.uri):
            for path in files:
                place = Path(self.name) / path.relative_to(root).parent
                self._client.log_artifact(self.run_id, str(path), artifact_path=place.as_posix())

    def _step_run(self) -> str:
        """The run of an earlier attempt at this step, set running again; else a new one."""
        experiment = self._client.get_run(self.stream_run).info.experiment_id
        earlier = self._client.search_runs(
            [experiment],
            filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.stream_run}' and tags.`{STEP_TAG}` = '{self.step}'",
            max_results=1,
        )
        if earlier:
            self._client.update_run(earlier[0].info.run_id, status="RUNNING")
            return str(earlier[0].info.run_id)
        tags = {MLFLOW_PARENT_RUN_ID: self.stream_run, STEP_TAG: str(self.step)}
        return str(self._client.create_run(experiment, tags=tags, run_name=self.name).info.run_id)

    def _log(self, run_id: str, values: Mapping[str, float], position: int) -> None:
        now = int(time.time() * 1000)
        if run_id not in self._known:
            self._known[run_id] = set(self._client.get_run(run_id).data.metrics)
        new = [key for key in values if position not in self._positions(run_id, key)]
        for first in range(0, len(new), MAX_METRICS_PER_BATCH):
            batch = new[first : first + MAX_METRICS_PER_BATCH]
            self._client.log_batch(run_id, metrics=[Metric(key, float(values[key]), now, position) for key in batch])
        for key in new:
            self._held[run_id, key].add(position)

    def _positions(self, run_id: str, key: str) -> set[int]:
        """Where the metric has a value already; asked of the server once, MLflow would keep both."""
        if key not in self._known[run_id]:
            self._held.setdefault((run_id, key), set())
        if (run_id, key) not in self._held:
            self._held[run_id, key] = {metric.step for metric in self._client.get_metric_history(run_id, key)}
        return self._held[run_id, key]


def _as_key(name: str) -> str:
    """A class name in the letters that MLflow takes."""
    return re.sub(r"[^\w \-.]", "_", name)


def _connect(uri: str) -> MlflowClient:
    """A client whose database is there: of processes that come at once, one makes it and the others wait."""
    with _first_use(uri):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client


def _first_use(uri: str) -> AbstractContextManager[Any]:
    if not uri.startswith(SQLITE):
        return nullcontext()
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{database}.lock", timeout=LOCK_SECONDS)


def _experiment(client: MlflowClient, uri: str, tracking: TrackingConfig, output: str) -> str:
    """The id of the experiment, made if need be. A server says itself where artifacts go; a database cannot."""
    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        location = None
        if not uri.startswith(("http://", "https://")):
            folder = _local_folder(output) / "mlartifacts"
            folder.mkdir(parents=True, exist_ok=True)
            location = folder.as_uri()
        try:
            return str(client.create_experiment(tracking.experiment, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(tracking.experiment)
            if found is None:  # so it was not another process that made it a moment ago
                raise
    return str(found.experiment_id)


def _knows(client: MlflowClient, run_id: str) -> bool:
    """Whether the server holds this run and has not deleted it."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def _local_folder(output: str) -> Path:
    path = output.removeprefix("file://")
    if "://" in path:
        raise ConfigError(
            f"output: {output}: a tracking database cannot be on object storage; "
            "give tracking.uri a server, or output a local folder"
        )
    return Path(path).absolute()


@contextmanager
def _reported(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into one line without credentials."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(_without_credentials(str(error)).split())[:300]
        raise TrackingError(
            f"{_without_credentials(uri)}: tracking failed ({reason}); start the server or correct tracking.uri; "
            "without tracking.uri the runs go to a database in the output folder"
        ) from None


def _without_credentials(text: str) -> str:
    """The text without users and passwords, and without the queries, of the urls in it."""
    return re.sub(r"\?\S+=\S*", "", re.sub(r"://\S*@", "://", text))
