"""Tracking events of one step. They are appended to the event queue and nowhere else: a call costs one line on disk.

Names of metrics, each with one axis. By incremental step, in the stream's run: `test/…`, `test_task/task_K`,
`time/…`; in the step's own run `test/…` and `time/…`. By iteration, in a step's run: `loss/…`, `optim/…`, `speed/…`,
`memory/…`; of whole epochs, at their last iteration: `epoch_loss/…`, `epoch_data/…`, `val/…`. By second since the
step first began: `system/…`.
"""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from avcil_dist.errors import StepStopped
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.summary import StepCommit, commit_digest, committed_folder, load_metrics
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.event_queue import EventQueue
from avcil_dist.tracking.results_note import results_note
from avcil_dist.tracking.tags import NOTE_TAG

STREAM = "stream"
READABLE = 200  # characters of a name that are kept; MLflow takes 250 in all
DIGEST = 36  # characters of a data set's digest that MLflow takes
SECONDS_PER_HOUR = 3600
_DIGEST = re.compile(r"-[0-9a-f]{8}$")
Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]


@dataclass(frozen=True)
class StepDescription:
    """Name, parameters and tags of a step's run; `shared_tags` are tags of the stream's run too."""

    name: str
    parameters: Mapping[str, object]
    tags: Mapping[str, str] = field(default_factory=dict)
    shared_tags: Mapping[str, str] = field(default_factory=dict)


class StepTracker:
    """The run of one step, child of the stream run, as a context manager.

    On exit the run ends: FINISHED, FAILED after an exception, KILLED after an interrupt or SystemExit. A step
    that was stopped and will be continued stays RUNNING.
    """

    def __init__(self, queue: EventQueue, step: int, described: "StepDescription | None" = None) -> None:
        self.queue, self.step, self.run = queue, step, str(step)
        self._described = described
        self._began = time.time()

    def __enter__(self) -> Self:
        begins = [event for event in self.queue.events("begin") if event["step"] == self.step]
        if begins and "time" in begins[0]:
            self._began = begins[0]["time"] / 1000
        self.queue.append("begin", step=self.step, **(asdict(self._described) if self._described else {}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = end_status(kind)
        if status != "RUNNING":
            self.queue.append("end", run=self.run, status=status)
        if status in ("FAILED", "KILLED"):  # on a cluster no other process ends the stream run
            self.queue.append("end", run=STREAM, status=status)

    def metrics(self, values: Mapping[str, float], position: int, *, is_synced: bool = True) -> None:
        """Log metrics of the step run at MLflow's step `position`. A position that has a value keeps it.

        `is_synced` is as for `EventQueue.append`.
        """
        self.queue.append("metrics", is_synced=is_synced, run=self.run, position=position, values=_floats(values))

    def system(self, values: Mapping[str, float]) -> None:
        """Log the load of the machines, at the number of seconds since the step first began."""
        named = {f"system/{name}": value for name, value in values.items()}
        self.metrics(named, position=max(0, round(time.time() - self._began)), is_synced=False)

    def publish(self, stream: str, url: str | None = None) -> None:
        """Log the committed step: its metrics, its data set if its `url` is given, and its files by reference."""
        metrics, (_, commit) = load_metrics(stream, self.step), committed_folder(stream, self.step)
        own = {f"test/{name}": value for name, value in metrics.scalars().items()} | _times(commit)
        self.queue.append("metrics", run=STREAM, position=self.step, values=own | _task_metrics(metrics))
        self.queue.append("metrics", run=self.run, position=self.step, values=own)
        if url is not None:
            source = redacted(url)
            name = PurePosixPath(urlsplit(source).path).parent.name or "shards"
            for run in (self.run, STREAM):
                self.queue.append("dataset", run=run, name=name, digest=commit.manifest_hash[:DIGEST], url=source)
            self.queue.append("tags", run=STREAM, tags={NOTE_TAG: results_note(metrics)})
        self.queue.append("artifact", step=self.step, committed=commit_digest(stream, self.step))

    def register(self, name: str) -> None:
        """Register the step's weights, the stream's final model, under this name in the model registry."""
        self.queue.append("register", step=self.step, name=name)


def unfinished_steps(queue: EventQueue) -> list[str]:
    """The runs of steps that began and have no end event."""
    begun: dict[str, None] = {}
    for event, _ in queue.read(0, limit=queue.size()):
        if event["kind"] == "begin":
            begun[str(event["step"])] = None
        elif event["kind"] == "end":
            begun.pop(event["run"], None)
    return list(begun)


def is_finished(queue: EventQueue) -> bool:
    """Whether the stream's run has ended with success since it was last opened or a step began."""

    def last(kind: str, **values: str) -> int:
        found = (
            offset for event, offset in queue.read(0, limit=queue.size(), kind=kind) if values.items() <= event.items()
        )
        return max(found, default=0)

    return last("end", run=STREAM, status="FINISHED") > max(last("open"), last("begin"))


def end_status(kind: type[BaseException] | None) -> Status:
    """The status of a run that ended with an exception of this type, or without one."""
    if kind is None:
        return "FINISHED"
    if issubclass(kind, StepStopped):
        return "RUNNING"
    return "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"


def _times(commit: StepCommit) -> dict[str, float]:
    """The time of the step, and its product with the number of GPUs, in hours."""
    hours = commit.seconds / SECONDS_PER_HOUR
    used = {"time/gpu_hours": hours * commit.ranks} if commit.device not in ("", "cpu") else {}
    return used | ({"time/hours": hours} if commit.seconds else {})


def _task_metrics(metrics: StreamMetrics) -> dict[str, float]:
    """Accuracy by task. Those by class and the confusion matrix are tables of the step's run."""
    return {f"test_task/task_{task}": accuracy for task, accuracy in enumerate(metrics.accuracy[-1])}


def as_metric_name(name: str) -> str:
    """Return a name of a metric or parameter that MLflow takes, distinct for distinct names.

    MLflow allows letters, digits and `_-. /` in at most 250 characters that are a plain path. A name with anything
    else keeps its readable part and gets a digest; so does one that ends like a digest.
    """
    parts = name.split("/")
    is_plain = re.fullmatch(r"[\w \-./]+", name) and all(part.strip(". ") for part in parts) and name[:2] != ".."
    return name if is_plain and len(name) <= READABLE and not _DIGEST.search(name) else _with_digest(parts, name)


def _with_digest(parts: Sequence[str], name: str) -> str:
    readable = "/".join(re.sub(r"[^\w \-.]|^\.\.?", "_", part) for part in parts if part)
    return f"{readable[:READABLE]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {as_metric_name(key): float(value) for key, value in values.items()}
