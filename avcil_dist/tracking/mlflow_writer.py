"""The records of a spool, told to MLflow: one run for the stream, a child run for each step.

Every record may come twice, after a crash between telling and noting it: runs are found again by
their tags, numbers whose position is held stay as they are, files that are there are not sent again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH
from requests import HTTPError

from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import AvcilError, StorageError
from avcil_dist.tracking.artifacts import upload_step
from avcil_dist.tracking.client import (
    COMMITTED_TAG,
    FAULTS,
    REFERENCE_TAG,
    STEP_TAG,
    STREAM_TAG,
    connect,
    experiment_id,
    find_by_stream_id,
    is_active,
    reason_of,
)
from avcil_dist.tracking.event_queue import Event
from avcil_dist.tracking.events import STREAM
from avcil_dist.tracking.sender import AwayError, RefusedError, RunGoneError

T = TypeVar("T")

# What a server says that will never take a request; all else may pass. Credentials can be mended while it waits.
NEVER = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
NEVER_STATUS = (400, 413, 422)


class MlflowWriter:
    """Tells one server or database of one stream; `runs` holds the ids of its runs there."""

    def __init__(
        self, uri: str, tracking: TrackingConfig, *, output: str, stream: str, stream_id: str, runs: dict[str, str]
    ) -> None:
        self.tracking, self.stream, self.stream_id, self.runs = tracking, stream, stream_id, runs
        self.is_uploading = False
        self._held: dict[tuple[str, str], set[int]] = {}
        self._known: dict[str, set[str]] = {}
        self._files: dict[str, set[str]] = {}
        self._client = self._set_up(lambda: connect(uri))
        self._experiment = self._set_up(lambda: experiment_id(self._client, uri, tracking, output))
        if STREAM in runs and not self._set_up(lambda: is_active(self._client, runs[STREAM])):
            raise RunGoneError

    def deliver(self, records: Sequence[Event]) -> None:
        """Tell the server these, of one kind; numbers of one run and many positions go in one call."""
        kind = records[0]["kind"]
        if kind == "metrics":
            self._told(lambda: self._metrics(records))
            return
        if kind == "open":
            for record in records:
                self._set_up(lambda record=record: self._open(record))  # type: ignore[misc]
            return
        tell: Callable[[Event], None] = {
            "begin": self._begin,
            "artifact": self._artifact,
            "register": self._register,
            "end": self._end,
        }[kind]
        for record in records:
            self._told(lambda record=record: tell(record))  # type: ignore[misc]

    def _open(self, record: Event) -> None:
        run_id = self.runs.get(STREAM)
        if run_id is None:
            found = find_by_stream_id(self._client, [self._experiment], self.stream_id)
            if found is None:
                tags = {STREAM_TAG: self.stream_id}
                found = self._client.create_run(
                    self._experiment, start_time=record["time"], tags=tags, run_name=record["name"]
                )
            run_id = self.runs[STREAM] = str(found.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        held = self._client.get_run(run_id).data.params  # a start that was cut off may have logged some, or none
        missing = [
            Param(key, str(value)[:MAX_PARAM_VAL_LENGTH])
            for key, value in record["parameters"].items()
            if key not in held
        ]
        for first in range(0, len(missing), MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(run_id, params=missing[first : first + MAX_PARAMS_TAGS_PER_BATCH])
        self._tag(run_id, record["tags"])

    def _begin(self, record: Event) -> None:
        self._client.update_run(self._run(STREAM), status="RUNNING")
        self._client.update_run(self._run(str(record["step"])), status="RUNNING")

    def _end(self, record: Event) -> None:
        self._client.set_terminated(self._run(record["run"]), record["status"], end_time=record["time"])

    def _artifact(self, record: Event) -> None:
        run_id, step = self._run(str(record["step"])), record["step"]
        if self._client.get_run(run_id).data.tags.get(COMMITTED_TAG) == record["committed"]:
            return
        sent = self._files.setdefault(record["committed"], set())
        self.is_uploading = True
        try:
            tags = upload_step(
                self._client, run_id, self.tracking, self.stream, step, stream_id=self.stream_id, sent=sent
            )
        finally:
            self.is_uploading = False
        self._tag(run_id, tags)

    def _register(self, record: Event) -> None:
        self.is_uploading = True
        try:
            from avcil_dist.tracking.registry import register_model  # encoders and decoders, for the last step alone

            step = record["step"]
            uri = self._client.get_run(self._run(str(step))).data.tags.get(REFERENCE_TAG)
            register_model(self._client, self._run(STREAM), self.stream, step, name=record["name"], uri=uri)
        finally:
            self.is_uploading = False

    def _metrics(self, records: Sequence[Event]) -> None:
        by_run: dict[str, list[Metric]] = {}
        for record in records:
            run_id, position = self._run(record["run"]), record["position"]
            for key, value in record["values"].items():
                if position not in self._positions(run_id, key):
                    by_run.setdefault(run_id, []).append(Metric(key, value, record["time"], position))
                    self._held[run_id, key].add(position)
        try:
            for run_id, metrics in by_run.items():
                for first in range(0, len(metrics), MAX_METRICS_PER_BATCH):
                    self._client.log_batch(run_id, metrics=metrics[first : first + MAX_METRICS_PER_BATCH])
        except BaseException:  # which of them came there is not known: it is asked again
            self._held.clear()
            self._known.clear()
            raise

    def _positions(self, run_id: str, key: str) -> set[int]:
        """Where the metric has a value already; asked of the server once, MLflow would keep both."""
        if run_id not in self._known:
            self._known[run_id] = set(self._client.get_run(run_id).data.metrics)
        if (run_id, key) not in self._held:
            history = self._client.get_metric_history(run_id, key) if key in self._known[run_id] else []
            self._held[run_id, key] = {metric.step for metric in history}
        return self._held[run_id, key]

    def _run(self, run: str) -> str:
        """The id of the stream's or a step's run; a step's is made when it is first spoken of."""
        if run not in self.runs and run != STREAM:
            parent = self.runs[STREAM]
            query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{STEP_TAG}` = '{run}'"
            found = self._client.search_runs([self._experiment], query, max_results=1)
            if not found:
                tags = {MLFLOW_PARENT_RUN_ID: parent, STEP_TAG: run}
                found = [self._client.create_run(self._experiment, tags=tags, run_name=f"step_{int(run):03d}")]
            self.runs[run] = str(found[0].info.run_id)
        return self.runs[run]

    def _tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _set_up(self, call: Callable[[], T]) -> T:
        """`call()`; without it nothing else can be told, so whatever is wrong must be mended and waited for."""
        try:
            return self._told(call)
        except RefusedError as error:
            raise AwayError(str(error)) from None

    def _told(self, call: Callable[[], T]) -> T:
        """`call()`; its errors as those of a delivery."""
        try:
            return call()
        except FAULTS as error:
            if not _is_final(error):
                raise AwayError(reason_of(error)) from None
            if self._is_gone():
                raise RunGoneError from None
            raise RefusedError(reason_of(error)) from None
        except StorageError as error:
            raise AwayError(str(error)) from None
        except AvcilError as error:
            raise RefusedError(str(error)) from None

    def _is_gone(self) -> bool:
        """Whether a run that was there has been deleted."""
        try:
            return not all(is_active(self._client, run_id) for run_id in self.runs.values())
        except FAULTS:
            return False


def _is_final(error: BaseException) -> bool:
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in NEVER_STATUS
    return isinstance(error, MlflowException) and error.error_code in NEVER
