"""MLflow client: connection to a server or database, translation of its errors, search for a stream's runs.

All calls go through `MlflowClient`. MLflow's notion of a current run is never used, so two streams in one
process do not interfere.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# MLflow reads these when it is imported or called. Values that the user has set are kept.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# MLflow's seven retries block a call for minutes; the sender retries instead.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
# Files from this size on are uploaded in parts, directly to the object storage of the server.
os.environ.setdefault("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(100 << 20))

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from pydantic import ValidationError
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import ConfigError, TrackingError

STEP_TAG = "avcil.step"
STREAM_TAG = "avcil.stream_id"  # of the stream run: identifies the stream on any server
COMMITTED_TAG = "avcil.committed"  # of a step run: the sha256 of its COMMITTED.json, set once all files are uploaded
REFERENCE_TAG = "avcil.artifact_uri"  # of a step run whose files are not in MLflow: the folder with the files
METHOD_TAG, FOLDER_TAG = "avcil.method", "avcil.stream"  # of the stream run
ORIGIN_RUN_TAG, ORIGIN_STEP_TAG, CHANGES_TAG = "avcil.fork_of", "avcil.fork_step", "avcil.changes"
SQLITE = "sqlite:///"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
LOCK_SECONDS = 300

logging.getLogger("alembic").setLevel(logging.WARNING)


def tracking_uri(tracking: TrackingConfig, output: str) -> str:
    """The uri of the server or database: as configured, else a sqlite database in the output folder.

    Raises ConfigError for an output folder on object storage, where sqlite cannot work, and for a uri of a scheme
    that MLflow does not support.
    """
    if tracking.uri is None:
        return f"{SQLITE}{local_folder(output) / 'mlflow.db'}"
    scheme = tracking.uri.split(":")[0].split("+")[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"tracking.uri: {tracking.uri}: neither a server (http://…) nor a database ({SQLITE}…); "
            "without it the runs go to a database in the output folder"
        )
    return tracking.uri


def with_uri(tracking: TrackingConfig, uri: str | None) -> TrackingConfig:
    """The settings with another server or database. Raises ConfigError for a uri that contains a password."""
    try:
        return TrackingConfig.model_validate(tracking.model_dump() | {"uri": uri})
    except ValidationError as error:
        raise ConfigError(f"--uri: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def connect(uri: str) -> MlflowClient:
    """Return a client. A missing sqlite database is created by one process while others wait."""
    with _creation_lock(uri):
        _create_database(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client


def experiment_id(client: MlflowClient, uri: str, tracking: TrackingConfig, output: str) -> str:
    """The id of the experiment, created if needed, with an artifact folder where `uri` is a database."""
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        location = None
        if not uri.startswith(("http://", "https://")):
            folder = local_folder(output) / "mlartifacts"
            folder.mkdir(parents=True, exist_ok=True)
            location = folder.as_uri()
        try:
            return str(client.create_experiment(tracking.experiment, artifact_location=location))
        except MlflowException:
            experiment = client.get_experiment_by_name(tracking.experiment)
            if experiment is None:  # another process did not create it in the meantime
                raise
    return str(experiment.experiment_id)


def is_active(client: MlflowClient, run_id: str) -> bool:
    """Whether the run exists on the server and is not deleted."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def find_by_stream_id(client: MlflowClient, experiments: list[str], stream_id: str) -> Run | None:
    """The run of the stream with this id, or None."""
    runs = client.search_runs(experiments, f"tags.`{STREAM_TAG}` = '{stream_id}'", max_results=1)
    return runs[0] if runs else None


def step_runs(client: MlflowClient, stream_run: Run) -> dict[int, Run]:
    """The runs of a stream's steps, by step."""
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{stream_run.info.run_id}'"
    runs = client.search_runs([stream_run.info.experiment_id], query)
    return {int(run.data.tags[STEP_TAG]): run for run in runs if STEP_TAG in run.data.tags}


@dataclass(frozen=True)
class TrackedStream:
    """The run of a stream on a server, and the runs of its steps."""

    client: MlflowClient
    run: Run
    steps: dict[int, Run]


def find_stream(uri: str, name: str) -> TrackedStream:
    """Find a stream by the id or name of its run, by the id of a step's run, or by the stream's own id.

    Raises TrackingError when no run or several runs match, and when the server does not answer.
    """
    with reported(uri):
        client = connect(uri)
        run = _run_of_id(client, name) or _run_of_name(client, uri, name)
        parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        run = client.get_run(parent) if parent else run
        if STREAM_TAG not in run.data.tags:
            raise TrackingError(
                f"{shown(uri)}: run {name} is not the run of a stream; give the id or name of a stream run"
            )
        return TrackedStream(client, run, step_runs(client, run))


def _run_of_id(client: MlflowClient, name: str) -> Run | None:
    if not re.fullmatch(r"[0-9a-f]{32}", name):
        return None
    if is_active(client, name):
        return client.get_run(name)
    return find_by_stream_id(client, _experiments(client), name)


def _run_of_name(client: MlflowClient, uri: str, name: str) -> Run:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise TrackingError(f"{shown(uri)}: {name!r} is neither the id nor the name of a stream run")
    runs = client.search_runs(_experiments(client), f"attributes.run_name = '{name}'", max_results=10)
    streams = [run for run in runs if STREAM_TAG in run.data.tags]
    if len(streams) == 1:
        return streams[0]
    if streams:
        ids = ", ".join(run.info.run_id for run in streams)
        raise TrackingError(f"{shown(uri)}: several streams are called {name}: {ids}; give the id of one")
    raise TrackingError(f"{shown(uri)}: no stream run {name}; --uri names another server or database")


def _experiments(client: MlflowClient) -> list[str]:
    return [experiment.experiment_id for experiment in client.search_experiments()]


def _creation_lock(uri: str) -> AbstractContextManager[Any]:
    database = _database(uri)
    if database is None:
        return nullcontext()
    database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{database}.lock", timeout=LOCK_SECONDS)


def _create_database(uri: str) -> None:
    """Create a sqlite database atomically: MLflow does not repair one that was only partly created."""
    database = _database(uri)
    if database is None or database.exists():
        return
    for path in database.parent.glob(f"{database.name}.new*"):
        path.unlink()
    new = Path(f"{database}.new")
    MlflowClient(tracking_uri=f"{SQLITE}{new}").search_experiments(max_results=1)
    new.replace(database)


def _database(uri: str) -> Path | None:
    """The path of a sqlite database; None for other databases and servers."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def local_folder(output: str) -> Path:
    """The output folder as a path. Raises ConfigError when it is on object storage."""
    path = output.removeprefix("file://")
    if "://" in path:
        raise ConfigError(
            f"output: {output}: a tracking database cannot be on object storage; "
            "give tracking.uri a server, or output a local folder"
        )
    return Path(path).absolute()


FAULTS = (MlflowException, RequestException, SQLAlchemyError, OSError, Timeout)


@contextmanager
def reported(uri: str) -> Iterator[None]:
    """Raise errors of MLflow as a TrackingError of one line without credentials."""
    try:
        yield
    except FAULTS as error:
        raise TrackingError(
            f"{shown(uri)}: tracking failed ({reason_of(error)}); start the server or correct tracking.uri"
        ) from None


def reason_of(error: BaseException) -> str:
    """The error in one line, without credentials; the cause where the text names one."""
    text = " ".join(shown(str(error)).split())
    cause = re.search(r"Caused by (.*)\)$", text)
    return (cause[1] if cause else text)[:300]


def shown(text: str) -> str:
    """The text with users, passwords and queries removed from the urls in it."""
    return re.sub(r"\?\S+=\S*", "", re.sub(r"://\S*@", "://", text))
