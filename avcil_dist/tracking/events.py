"""Tracking events of one step. They are appended to the event queue and nowhere else: a call costs one line on disk.

Names of metrics. Stream run: `test/…`, one value per step. Step run: `task_accuracy/task_K` and
`class_accuracy/NAME` after the step; the values of an epoch come from the trainer.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from avcil_dist import storage
from avcil_dist.errors import StepStopped
from avcil_dist.streams.commit import COMMITTED
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.summary import load_metrics, step_url
from avcil_dist.tracking.event_queue import EventQueue

STREAM = "stream"
READABLE = 200  # characters of a name that are kept; MLflow takes 250 in all
_DIGEST = re.compile(r"-[0-9a-f]{8}$")
Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]


class StepTracker:
    """The run of one step, child of the stream run, as a context manager.

    On exit the run ends: FINISHED, FAILED after an exception, KILLED after an interrupt or SystemExit. A step
    that was stopped and will be continued stays RUNNING.
    """

    def __init__(self, queue: EventQueue, step: int) -> None:
        self.queue, self.step, self.run = queue, step, str(step)

    def __enter__(self) -> Self:
        self.queue.append("begin", step=self.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = end_status(kind)
        if status != "RUNNING":
            self.queue.append("end", run=self.run, status=status)
        if status in ("FAILED", "KILLED"):  # on a cluster no other process ends the stream run
            self.queue.append("end", run=STREAM, status=status)

    def metrics(self, values: Mapping[str, float], position: int) -> None:
        """Log metrics of the step run at MLflow's step `position`. A position that has a value keeps it."""
        self.queue.append("metrics", run=self.run, position=position, values=_floats(values))

    def publish(self, stream: str) -> None:
        """Log the committed step: its metrics, and its files by reference."""
        metrics = load_metrics(stream, self.step)
        self.queue.append("metrics", run=STREAM, position=self.step, values=_stream_metrics(metrics))
        self.queue.append("metrics", run=self.run, position=self.step, values=_step_metrics(metrics))
        digest = storage.sha256_file(storage.join(step_url(stream, self.step), COMMITTED))
        self.queue.append("artifact", step=self.step, committed=digest)

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


def end_status(kind: type[BaseException] | None) -> Status:
    """The status of a run that ended with an exception of this type, or without one."""
    if kind is None:
        return "FINISHED"
    if issubclass(kind, StepStopped):
        return "RUNNING"
    return "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"


def _stream_metrics(metrics: StreamMetrics) -> dict[str, float]:
    return {f"test/{name}": value for name, value in metrics.scalars().items()}


def _step_metrics(metrics: StreamMetrics) -> dict[str, float]:
    """Accuracy by task and by class. The confusion matrix stays in the artifact's metrics.json."""
    tasks = {f"task_accuracy/task_{task}": accuracy for task, accuracy in enumerate(metrics.accuracy[-1])}
    return tasks | {f"class_accuracy/{_as_last_part(name)}": value for name, value in metrics.per_class.items()}


def as_metric_name(name: str) -> str:
    """Return a name of a metric or parameter that MLflow takes, distinct for distinct names.

    MLflow allows letters, digits and `_-. /` in at most 250 characters that are a plain path. A name with anything
    else keeps its readable part and gets a digest; so does one that ends like a digest.
    """
    parts = name.split("/")
    is_plain = re.fullmatch(r"[\w \-./]+", name) and all(part.strip(". ") for part in parts) and name[:2] != ".."
    return name if is_plain and len(name) <= READABLE and not _DIGEST.search(name) else _with_digest(parts, name)


def _as_last_part(name: str) -> str:
    """Return a class name as the last part of a metric's name; a slash in it begins no further part."""
    return _with_digest([name], name) if "/" in name else as_metric_name(name)


def _with_digest(parts: Sequence[str], name: str) -> str:
    readable = "/".join(re.sub(r"[^\w \-.]|^\.\.?", "_", part) for part in parts if part)
    return f"{readable[:READABLE]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {as_metric_name(key): float(value) for key, value in values.items()}
