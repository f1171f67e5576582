"""Tracking events of one step. They are appended to the event queue and nowhere else: a call costs one line on disk.

Names of metrics. Stream run: `test/…`, one value per step. Step run: `task_accuracy/task_K` and
`class_accuracy/NAME` after the step; the values of an epoch come from the trainer.
"""

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, Self

from avcil_dist import storage
from avcil_dist.errors import StepStopped
from avcil_dist.streams.artifact import load_metrics, step_url
from avcil_dist.streams.commit import COMMITTED
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.tracking.event_queue import EventQueue

STREAM = "stream"
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
    return tasks | {f"class_accuracy/{_as_key(name)}": value for name, value in metrics.per_class.items()}


def _as_key(name: str) -> str:
    """A class name in the characters that MLflow allows in a metric name."""
    return re.sub(r"[^\w \-.]", "_", name)


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}
