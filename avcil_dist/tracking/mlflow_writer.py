"""Writes tracking events to MLflow: one run for the stream, a child run for each step.

Any event may come twice, after a crash between the call and the update of the cursor: runs are found by their
tags, a metric that has a value at a position keeps it, files that were uploaded are not uploaded again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TypeVar

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID

from avcil_dist import storage
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import AvcilError, StorageError
from avcil_dist.streams.summary import load_metrics, task_sizes
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.artifacts import transfer, upload_step
from avcil_dist.tracking.batches import BatchWriter
from avcil_dist.tracking.client import active_run, connect, experiment_id, find_by_stream_id
from avcil_dist.tracking.event_queue import Event
from avcil_dist.tracking.events import STREAM, as_metric_name
from avcil_dist.tracking.faults import FAULTS, delivery_error
from avcil_dist.tracking.outcomes import RefusedError, RejectedError, RunDeletedError, UnavailableError
from avcil_dist.tracking.step_tables import write_step_tables
from avcil_dist.tracking.tags import COMMITTED_TAG, REFERENCE_TAG, STEP_TAG, STREAM_TAG

T = TypeVar("T")


class MlflowWriter:
    """Writer of one stream to one server or database. `runs`, `experiment`: ids of its runs and of their experiment."""

    def __init__(
        self, uri: str, tracking: TrackingConfig, *, output: str, stream: str, stream_id: str, runs: dict[str, str]
    ) -> None:
        self.tracking, self.stream, self.stream_id, self.runs = tracking, stream, stream_id, runs
        self.is_uploading = False
        self._positions: dict[tuple[str, str], set[int]] = {}
        self._metric_names: dict[str, set[str]] = {}
        self._files: dict[str, set[str]] = {}
        self._client = self._set_up(lambda: connect(uri))
        self._batches = BatchWriter(self._client, redacted(uri), self._check_runs)
        self.experiment = self._set_up(lambda: self._experiment(uri, output))

    def _experiment(self, uri: str, output: str) -> str:
        """The id of the experiment of the stream's run; that of the settings, if the server has no run of the stream.

        So a stream is whole in one experiment, whatever name the settings have later.
        """
        known = self.runs.get(STREAM)
        run = active_run(self._client, known) if known else find_by_stream_id(self._client, self.stream_id)
        if run is not None:
            self.runs[STREAM] = str(run.info.run_id)
            return str(run.info.experiment_id)
        experiment = experiment_id(self._client, uri, self.tracking, output)
        if known:
            raise RunDeletedError
        return experiment

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
            "tags": lambda event: self._tag(self._run(event["run"]), event["tags"]),
            "dataset": self._dataset,
            "file": self._file,
            "register": self._register,
            "end": self._end,
        }[kind]
        for event in events:
            self._call(lambda event=event: handle(event))  # type: ignore[misc]

    def _open(self, event: Event) -> None:
        run_id = self._stream_run(event["name"], event["time"])
        self._client.update_run(run_id, status="RUNNING")
        self._parameters(run_id, event["parameters"])
        self._tag(run_id, event["tags"])

    def _begin(self, event: Event) -> None:
        stream = self._run(STREAM)
        run_id = self._run(str(event["step"]), event.get("name"), event.get("time"))
        for run in (stream, run_id):
            self._client.update_run(run, status="RUNNING")
        self._parameters(run_id, event.get("parameters", {}))
        self._tag(run_id, event.get("tags", {}))
        for run in (run_id, stream):
            self._tag(run, event.get("shared_tags", {}))

    def _parameters(self, run_id: str, parameters: Mapping[str, object]) -> None:
        logged = self._client.get_run(run_id).data.params  # a start that was cut off may have logged some, or none
        named = {as_metric_name(key): value for key, value in parameters.items()}
        self._batches.params(run_id, [Param(key, str(value)) for key, value in named.items() if key not in logged])

    def _dataset(self, event: Event) -> None:
        source = json.dumps({"url": event["url"]})
        dataset = Dataset(event["name"], event["digest"], "avcil-dist manifest", source)
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
        self._client.log_inputs(self._run(event["run"]), [DatasetInput(dataset, tags)])

    def _file(self, event: Event) -> None:
        """Upload a file of the stream's folder to the stream's run."""
        run_id = self._run(STREAM)
        with self._uploading(), storage.local_copy(storage.join(self.stream, event["file"])) as path:
            transfer(lambda: self._client.log_artifact(run_id, str(path)), path.stat().st_size)

    def _end(self, event: Event) -> None:
        self._client.set_terminated(self._run(event["run"]), event["status"], end_time=event["time"])

    def _artifact(self, event: Event) -> None:
        run_id, step = self._run(str(event["step"])), event["step"]
        if self._client.get_run(run_id).data.tags.get(COMMITTED_TAG) == event["committed"]:
            return
        uploaded = self._files.setdefault(event["committed"], set())
        with self._uploading():
            tags = upload_step(
                self._client, run_id, self.tracking, self.stream, step, stream_id=self.stream_id, uploaded=uploaded
            )
            tables = self._upload_tables(run_id, step)
        self._tag(run_id, tags | tables)

    def _upload_tables(self, run_id: str, step: int) -> dict[str, str]:
        """Upload tables and picture of a committed step; return the tag by which MLflow's pages find the tables."""
        metrics = load_metrics(self.stream, step)
        with storage.temporary_folder() as folder:
            tables = write_step_tables(folder, metrics, task_sizes(self.stream, step))
            size = sum(path.stat().st_size for path in folder.iterdir())
            transfer(lambda: self._client.log_artifacts(run_id, str(folder)), size)
        return {MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": name, "type": "table"} for name in tables])}

    def _register(self, event: Event) -> None:
        step = event["step"]
        with self._uploading():
            from avcil_dist.tracking.registry import register_model  # encoders and decoders, for the last step alone

            uri = self._client.get_run(self._run(str(step))).data.tags.get(REFERENCE_TAG)
            register_model(self._client, self._run(STREAM), self.stream, step, name=event["name"], uri=uri)

    @contextmanager
    def _uploading(self) -> Iterator[None]:
        """Mark the writer as uploading during the block: the sender's end waits for a file, not for a request."""
        self.is_uploading = True
        try:
            yield
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
                self._batches.metrics(run_id, metrics)
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

    def _stream_run(self, name: str, time: int | None = None) -> str:
        """The id of the stream's run, which is created when it is first needed."""
        if STREAM not in self.runs:
            tags = {STREAM_TAG: self.stream_id}
            run = self._client.create_run(self.experiment, start_time=time, tags=tags, run_name=name)
            self.runs[STREAM] = str(run.info.run_id)
        return self.runs[STREAM]

    def _run(self, run: str, name: str | None = None, time: int | None = None) -> str:
        """The id of the stream's or a step's run; a step's run is created, with this name, when it is first needed."""
        parent = self._stream_run(PurePosixPath(self.stream).name)  # its open event may be missing, after a full disk
        if run not in self.runs:
            query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{STEP_TAG}` = '{run}'"
            runs = self._client.search_runs([self.experiment], query, max_results=1)
            if not runs:
                tags = {MLFLOW_PARENT_RUN_ID: parent, STEP_TAG: run}
                name = name or f"{PurePosixPath(self.stream).name}-step{int(run):03d}"
                runs = [self._client.create_run(self.experiment, start_time=time, tags=tags, run_name=name)]
            self.runs[run] = str(runs[0].info.run_id)
        return self.runs[run]

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._batches.tags(run_id, [RunTag(key, str(value)) for key, value in tags.items()])

    def _set_up(self, call: Callable[[], T]) -> T:
        """Return `call()`, without which no event can be written: a final error is one of the whole stream."""
        try:
            return self._translated(call)
        except RejectedError as error:
            raise RefusedError(f"{error}; correct the cause") from None

    def _call(self, call: Callable[[], T]) -> T:
        """Return `call()`. A refusal costs this event alone if the server still answers for the stream's run."""
        try:
            return self._translated(call)
        except RefusedError as error:
            if STREAM not in self.runs:
                raise
            if self._translated(lambda: active_run(self._client, self.runs[STREAM])):
                raise RejectedError(str(error)) from None
            raise RunDeletedError from None
        except RejectedError:
            self._check_runs()
            raise

    def _translated(self, call: Callable[[], T]) -> T:
        """Return `call()`, its errors translated to those of `EventWriter.write`."""
        try:
            return call()
        except FAULTS as error:
            raise delivery_error(error) from None
        except StorageError as error:
            raise UnavailableError(str(error)) from None
        except AvcilError as error:
            raise RejectedError(str(error)) from None

    def _check_runs(self) -> None:
        """Raise RunDeletedError if one of the stream's runs was deleted on the server."""
        if not self._translated(lambda: all(active_run(self._client, run_id) for run_id in self.runs.values())):
            raise RunDeletedError
