"""Writes tracking events to MLflow: one run for the stream, a child run for each step.

Any event may come twice, after a crash between the call and the update of the cursor: runs are found by their
tags, a metric that has a value at a position keeps it, files that were uploaded are not uploaded again.
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
from avcil_dist.tracking.sender import RejectedError, RunDeletedError, UnavailableError

T = TypeVar("T")

# Error codes of a request that can never succeed; others may pass, credentials for example can be corrected.
FINAL_CODES = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
FINAL_STATUS = (400, 413, 422)


class MlflowWriter:
    """Writer of one stream to one server or database; `runs` holds the ids of the stream's runs there."""

    def __init__(
        self, uri: str, tracking: TrackingConfig, *, output: str, stream: str, stream_id: str, runs: dict[str, str]
    ) -> None:
        self.tracking, self.stream, self.stream_id, self.runs = tracking, stream, stream_id, runs
        self.is_uploading = False
        self._positions: dict[tuple[str, str], set[int]] = {}
        self._metric_names: dict[str, set[str]] = {}
        self._files: dict[str, set[str]] = {}
        self._client = self._set_up(lambda: connect(uri))
        self._experiment = self._set_up(lambda: experiment_id(self._client, uri, tracking, output))
        if STREAM in runs and not self._set_up(lambda: is_active(self._client, runs[STREAM])):
            raise RunDeletedError

    def write(self, events: Sequence[Event]) -> None:
        """Write events of one kind; metrics of one run and several positions go in one call."""
        kind = events[0]["kind"]
        if kind == "metrics":
            self._call(lambda: self._log_metrics(events))
            return
        if kind == "open":
            for event in events:
                self._set_up(lambda event=event: self._open(event))  # type: ignore[misc]
            return
        handle: Callable[[Event], None] = {
            "begin": self._begin,
            "artifact": self._artifact,
            "register": self._register,
            "end": self._end,
        }[kind]
        for event in events:
            self._call(lambda event=event: handle(event))  # type: ignore[misc]

    def _open(self, event: Event) -> None:
        run_id = self.runs.get(STREAM)
        if run_id is None:
            run = find_by_stream_id(self._client, [self._experiment], self.stream_id)
            if run is None:
                tags = {STREAM_TAG: self.stream_id}
                run = self._client.create_run(
                    self._experiment, start_time=event["time"], tags=tags, run_name=event["name"]
                )
            run_id = self.runs[STREAM] = str(run.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        logged = self._client.get_run(run_id).data.params  # a start that was cut off may have logged some, or none
        missing = [
            Param(key, str(value)[:MAX_PARAM_VAL_LENGTH])
            for key, value in event["parameters"].items()
            if key not in logged
        ]
        for first in range(0, len(missing), MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(run_id, params=missing[first : first + MAX_PARAMS_TAGS_PER_BATCH])
        self._tag(run_id, event["tags"])

    def _begin(self, event: Event) -> None:
        self._client.update_run(self._run(STREAM), status="RUNNING")
        self._client.update_run(self._run(str(event["step"])), status="RUNNING")

    def _end(self, event: Event) -> None:
        self._client.set_terminated(self._run(event["run"]), event["status"], end_time=event["time"])

    def _artifact(self, event: Event) -> None:
        run_id, step = self._run(str(event["step"])), event["step"]
        if self._client.get_run(run_id).data.tags.get(COMMITTED_TAG) == event["committed"]:
            return
        uploaded = self._files.setdefault(event["committed"], set())
        self.is_uploading = True
        try:
            tags = upload_step(
                self._client, run_id, self.tracking, self.stream, step, stream_id=self.stream_id, uploaded=uploaded
            )
        finally:
            self.is_uploading = False
        self._tag(run_id, tags)

    def _register(self, event: Event) -> None:
        self.is_uploading = True
        try:
            from avcil_dist.tracking.registry import register_model  # encoders and decoders, for the last step alone

            step = event["step"]
            uri = self._client.get_run(self._run(str(step))).data.tags.get(REFERENCE_TAG)
            register_model(self._client, self._run(STREAM), self.stream, step, name=event["name"], uri=uri)
        finally:
            self.is_uploading = False

    def _log_metrics(self, events: Sequence[Event]) -> None:
        by_run: dict[str, list[Metric]] = {}
        for event in events:
            run_id, position = self._run(event["run"]), event["position"]
            for key, value in event["values"].items():
                if position not in self._logged_positions(run_id, key):
                    by_run.setdefault(run_id, []).append(Metric(key, value, event["time"], position))
                    self._positions[run_id, key].add(position)
        try:
            for run_id, metrics in by_run.items():
                for first in range(0, len(metrics), MAX_METRICS_PER_BATCH):
                    self._client.log_batch(run_id, metrics=metrics[first : first + MAX_METRICS_PER_BATCH])
        except BaseException:  # which of them the server has is unknown: read it again
            self._positions.clear()
            self._metric_names.clear()
            raise

    def _logged_positions(self, run_id: str, key: str) -> set[int]:
        """Positions at which the metric has a value, read from the server once: MLflow would keep both values."""
        if run_id not in self._metric_names:
            self._metric_names[run_id] = set(self._client.get_run(run_id).data.metrics)
        if (run_id, key) not in self._positions:
            history = self._client.get_metric_history(run_id, key) if key in self._metric_names[run_id] else []
            self._positions[run_id, key] = {metric.step for metric in history}
        return self._positions[run_id, key]

    def _run(self, run: str) -> str:
        """The id of the stream's or a step's run; a step's run is created when it is first needed."""
        if run not in self.runs and run != STREAM:
            parent = self.runs[STREAM]
            query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{STEP_TAG}` = '{run}'"
            runs = self._client.search_runs([self._experiment], query, max_results=1)
            if not runs:
                tags = {MLFLOW_PARENT_RUN_ID: parent, STEP_TAG: run}
                runs = [self._client.create_run(self._experiment, tags=tags, run_name=f"step_{int(run):03d}")]
            self.runs[run] = str(runs[0].info.run_id)
        return self.runs[run]

    def _tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _set_up(self, call: Callable[[], T]) -> T:
        """Return `call()`. No event can be written without it, so even a final error is one to wait for."""
        try:
            return self._call(call)
        except RejectedError as error:
            raise UnavailableError(str(error)) from None

    def _call(self, call: Callable[[], T]) -> T:
        """Return `call()`, its errors translated to those of `EventWriter.write`."""
        try:
            return call()
        except FAULTS as error:
            if not _is_final(error):
                raise UnavailableError(reason_of(error)) from None
            if self._is_deleted():
                raise RunDeletedError from None
            raise RejectedError(reason_of(error)) from None
        except StorageError as error:
            raise UnavailableError(str(error)) from None
        except AvcilError as error:
            raise RejectedError(str(error)) from None

    def _is_deleted(self) -> bool:
        """Whether one of the stream's runs was deleted on the server."""
        try:
            return not all(is_active(self._client, run_id) for run_id in self.runs.values())
        except FAULTS:
            return False


def _is_final(error: BaseException) -> bool:
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in FINAL_STATUS
    return isinstance(error, MlflowException) and error.error_code in FINAL_CODES
