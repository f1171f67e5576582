"""MLflow client: connection to a server or database, translation of its errors, search for a stream's runs.

All calls go through `MlflowClient`. MLflow's notion of a current run is never used, so two streams in one
process do not interfere.
"""

import logging
import re
from contextlib import suppress
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import TrackingError
from avcil_dist.streams.stream import ARTIFACT_FOLDER
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking import environment
from avcil_dist.tracking.answers import bound_answers
from avcil_dist.tracking.database import create_database, creation_lock
from avcil_dist.tracking.faults import bounded, bounded_client, reported
from avcil_dist.tracking.outcomes import RefusedError
from avcil_dist.tracking.tags import STEP_TAG, STREAM_TAG, received_tags
from avcil_dist.tracking.uris import is_server, local_folder

# The view in which MLflow's pages open the experiment, "Model training"; MLflow's package has no name for it.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
EXPERIMENTS = 100  # that are searched for runs in one call

logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(uri: str) -> MlflowClient:
    """Return a client whose requests are bounded. A missing sqlite database is created by one process, others wait."""
    environment.isolate()
    bound_answers()
    with creation_lock(uri):
        create_database(uri)
        client = bounded(lambda: MlflowClient(tracking_uri=uri, registry_uri=uri), environment.REQUEST_SECONDS)
        client = bounded_client(client)
        client.search_experiments(max_results=1)
        return client


def experiment_id(client: MlflowClient, uri: str, tracking: TrackingConfig, output: str) -> str:
    """The id of the experiment, created if needed, with an artifact folder where `uri` is a database.

    Raises RefusedError for an experiment that was deleted: its name stays taken.
    """
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        location = None
        if not is_server(uri):
            folder = local_folder(output) / ARTIFACT_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            location = folder.as_uri()
        try:
            return str(client.create_experiment(tracking.experiment, artifact_location=location, tags={KIND_TAG: KIND}))
        except MlflowException:
            experiment = client.get_experiment_by_name(tracking.experiment)
            if experiment is None:  # another process did not create it in the meantime
                raise
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise RefusedError(
            f"the experiment {tracking.experiment} was deleted there; restore it with mlflow experiments restore -x "
            f"{experiment.experiment_id} (MLFLOW_TRACKING_URI={redacted(uri)}), or name another: tracking.experiment="
        )
    if KIND_TAG not in experiment.tags:
        with suppress(MlflowException):  # an experiment of somebody else
            client.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)
    return str(experiment.experiment_id)


def active_run(client: MlflowClient, run_id: str) -> Run | None:
    """The run with this id; None where the server has none, or has deleted it."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == LifecycleStage.ACTIVE else None


def find_by_stream_id(client: MlflowClient, stream_id: str) -> Run | None:
    """The run of the stream with this id, in whatever experiment it is, or None."""
    runs = _search_everywhere(client, f"tags.`{STREAM_TAG}` = '{stream_id}'", 1)
    return runs[0] if runs else None


def step_runs(client: MlflowClient, stream_run: Run) -> dict[int, Run]:
    """The runs of a stream's steps, by step. Raises TrackingError for tags that this program does not write."""
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{stream_run.info.run_id}'"
    runs = client.search_runs([stream_run.info.experiment_id], query)
    tagged = [(received_tags(run.data.tags, run.info.run_id), run) for run in runs if STEP_TAG in run.data.tags]
    return {int(tags.step): run for tags, run in tagged if tags.step is not None}


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
                f"{redacted(uri)}: run {name} is not the run of a stream; give the id or name of a stream run"
            )
        received_tags(run.data.tags, run.info.run_id)
        return TrackedStream(client, run, step_runs(client, run))


def _run_of_id(client: MlflowClient, name: str) -> Run | None:
    if not re.fullmatch(r"[0-9a-f]{32}", name):
        return None
    return active_run(client, name) or find_by_stream_id(client, name)


def _run_of_name(client: MlflowClient, uri: str, name: str) -> Run:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise TrackingError(f"{redacted(uri)}: {name!r} is neither the id nor the name of a stream run")
    runs = _search_everywhere(client, f"attributes.run_name = '{name}'", 10)
    streams = [run for run in runs if STREAM_TAG in run.data.tags]
    if len(streams) == 1:
        return streams[0]
    if streams:
        ids = ", ".join(run.info.run_id for run in streams)
        raise TrackingError(f"{redacted(uri)}: several streams are called {name}: {ids}; give the id of one")
    raise TrackingError(f"{redacted(uri)}: no stream run {name}; --uri names another server or database")


def _search_everywhere(client: MlflowClient, query: str, max_results: int) -> list[Run]:
    """Runs of all experiments, at most `max_results` of a page of experiments."""
    runs, token = list[Run](), None
    while True:
        page = client.search_experiments(max_results=EXPERIMENTS, page_token=token)
        if page:
            runs += client.search_runs([found.experiment_id for found in page], query, max_results=max_results)
        token = page.token
        if not token or len(runs) >= max_results:
            return runs
