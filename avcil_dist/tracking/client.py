"""The way to MLflow: where its server or database is, how its errors are told apart, how a stream is found there.

Everything goes through `MlflowClient`; MLflow's own notion of a current run is never used, so two
streams in one process do not meet.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read while MLflow is imported, or at each call. What the user has set stays.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# MLflow's own seven retries take minutes, in which nothing is known of the server; ours are the sender's.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
# A server that keeps artifacts in object storage takes files from this size on in parts, straight into the storage.
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
STREAM_TAG = "avcil.stream_id"  # of the stream run; whoever knows it finds the run, whoever made it
COMMITTED_TAG = "avcil.committed"  # of a step run: the sha256 of its COMMITTED.json, once all files are there
REFERENCE_TAG = "avcil.artifact_uri"  # of a step run whose files are not in MLflow: their folder
ORIGIN_RUN_TAG, ORIGIN_STEP_TAG, CHANGES_TAG = "avcil.fork_of", "avcil.fork_step", "avcil.changes"
SQLITE = "sqlite:///"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
LOCK_SECONDS = 300

logging.getLogger("alembic").setLevel(logging.WARNING)


def tracking_uri(tracking: TrackingConfig, output: str) -> str:
    """Where the runs are kept: as configured, else a sqlite database in the output folder.

    Raises ConfigError when the output folder is on object storage, where no database can be, and for a uri
    that MLflow does not know.
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
    """The settings with another server or database. Raises ConfigError for a uri that has a password in it."""
    try:
        return TrackingConfig.model_validate(tracking.model_dump() | {"uri": uri})
    except ValidationError as error:
        raise ConfigError(f"--uri: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def connect(uri: str) -> MlflowClient:
    """A client whose database is there: of processes that come at once, one makes it and the others wait."""
    with _first_use(uri):
        _make_database(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client


def experiment_id(client: MlflowClient, uri: str, tracking: TrackingConfig, output: str) -> str:
    """The id of the experiment, made if need be. A server says itself where artifacts go; a database cannot."""
    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        location = None
        if not uri.startswith(("http://", "https://")):
            folder = local_folder(output) / "mlartifacts"
            folder.mkdir(parents=True, exist_ok=True)
            location = folder.as_uri()
        try:
            return str(client.create_experiment(tracking.experiment, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(tracking.experiment)
            if found is None:  # so it was not another process that made it a moment ago
                raise
    return str(found.experiment_id)


def is_active(client: MlflowClient, run_id: str) -> bool:
    """Whether the server holds this run and has not deleted it."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def find_by_stream_id(client: MlflowClient, experiments: list[str], stream_id: str) -> Run | None:
    """The stream run of this identity, or None."""
    found = client.search_runs(experiments, f"tags.`{STREAM_TAG}` = '{stream_id}'", max_results=1)
    return found[0] if found else None


def step_runs(client: MlflowClient, stream_run: Run) -> dict[int, Run]:
    """The runs of a stream's steps."""
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{stream_run.info.run_id}'"
    found = client.search_runs([stream_run.info.experiment_id], query)
    return {int(run.data.tags[STEP_TAG]): run for run in found if STEP_TAG in run.data.tags}


@dataclass(frozen=True)
class FoundStream:
    """A stream run as a server holds it."""

    client: MlflowClient
    run: Run
    steps: dict[int, Run]


def find_stream(uri: str, name: str) -> FoundStream:
    """The stream whose run has this id or name; the id of one of its steps' runs will do, and the stream's own id.

    Raises TrackingError when there is none or the server does not answer, and for a name that several have.
    """
    with reported(uri):
        client = connect(uri)
        run = _run_of_id(client, name) or _run_of_name(client, uri, name)
        parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        run = client.get_run(parent) if parent else run
        if STREAM_TAG not in run.data.tags:
            raise TrackingError(f"{shown(uri)}: run {name} is not a stream's; give the id or name of a stream run")
        return FoundStream(client, run, step_runs(client, run))


def _run_of_id(client: MlflowClient, name: str) -> Run | None:
    if not re.fullmatch(r"[0-9a-f]{32}", name):
        return None
    if is_active(client, name):
        return client.get_run(name)
    return find_by_stream_id(client, _experiments(client), name)


def _run_of_name(client: MlflowClient, uri: str, name: str) -> Run:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise TrackingError(f"{shown(uri)}: {name!r} is neither the id nor the name of a stream run")
    found = client.search_runs(_experiments(client), f"attributes.run_name = '{name}'", max_results=10)
    streams = [run for run in found if STREAM_TAG in run.data.tags]
    if len(streams) == 1:
        return streams[0]
    if streams:
        ids = ", ".join(run.info.run_id for run in streams)
        raise TrackingError(f"{shown(uri)}: several streams are called {name}: {ids}; give the id of one")
    raise TrackingError(f"{shown(uri)}: no stream run {name}; --uri names another server or database")


def _experiments(client: MlflowClient) -> list[str]:
    return [found.experiment_id for found in client.search_experiments()]


def _first_use(uri: str) -> AbstractContextManager[Any]:
    database = _database(uri)
    if database is None:
        return nullcontext()
    database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{database}.lock", timeout=LOCK_SECONDS)


def _make_database(uri: str) -> None:
    """Make a sqlite database as a whole: MLflow never mends one whose making was cut off."""
    database = _database(uri)
    if database is None or database.exists():
        return
    for path in database.parent.glob(f"{database.name}.new*"):
        path.unlink()
    new = Path(f"{database}.new")
    MlflowClient(tracking_uri=f"{SQLITE}{new}").search_experiments(max_results=1)
    new.replace(database)


def _database(uri: str) -> Path | None:
    """The file of a sqlite database; None for other databases and servers."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def local_folder(output: str) -> Path:
    """The output folder as a path. Raises ConfigError where it is on object storage."""
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
    """Turn what MLflow raises into one line without credentials."""
    try:
        yield
    except FAULTS as error:
        raise TrackingError(
            f"{shown(uri)}: tracking failed ({reason_of(error)}); start the server or correct tracking.uri"
        ) from None


def reason_of(error: BaseException) -> str:
    """The error in one line, without credentials; of a call that failed for a cause, the cause."""
    text = " ".join(shown(str(error)).split())
    cause = re.search(r"Caused by (.*)\)$", text)
    return (cause[1] if cause else text)[:300]


def shown(text: str) -> str:
    """The text without users and passwords, and without the queries, of the urls in it."""
    return re.sub(r"\?\S+=\S*", "", re.sub(r"://\S*@", "://", text))
