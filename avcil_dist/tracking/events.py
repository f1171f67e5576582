"""What a step tells of itself. It goes into the spool and nowhere else, so it costs a line on the disk."""

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
    """One step's run, child of the stream run, as a context manager.

    Leaving says how the step ended: FINISHED, FAILED on an exception, KILLED on an interrupt or SystemExit. A step
    that was stopped to be continued stays RUNNING.
    """

    def __init__(self, spool: EventQueue, step: int) -> None:
        self.spool, self.step, self.run = spool, step, str(step)

    def __enter__(self) -> Self:
        self.spool.append("begin", step=self.step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = end_status(kind)
        if status != "RUNNING":
            self.spool.append("end", run=self.run, status=status)
        if status in ("FAILED", "KILLED"):  # on a cluster nobody else is there to say it of the stream
            self.spool.append("end", run=STREAM, status=status)

    def metrics(self, values: Mapping[str, float], position: int) -> None:
        """Numbers of the step run at MLflow's step `position`; a position that is held already stays as it is."""
        self.spool.append("metrics", run=self.run, position=position, values=_floats(values))

    def publish(self, stream: str) -> None:
        """The committed step: its metrics, and its files by reference."""
        metrics = load_metrics(stream, self.step)
        self.spool.append("metrics", run=STREAM, position=self.step, values=_of_stream(metrics))
        self.spool.append("metrics", run=self.run, position=self.step, values=_of_step(metrics))
        committed = storage.sha256_file(storage.join(step_url(stream, self.step), COMMITTED))
        self.spool.append("artifact", step=self.step, committed=committed)

    def register(self, name: str) -> None:
        """The step's weights are the stream's final model, under this name in the model registry."""
        self.spool.append("register", step=self.step, name=name)


def unended_steps(spool: EventQueue) -> list[str]:
    """The runs of steps that began and of which nobody said how they ended."""
    begun: dict[str, None] = {}
    for record, _ in spool.read(0, limit=spool.size()):
        if record["kind"] == "begin":
            begun[str(record["step"])] = None
        elif record["kind"] == "end":
            begun.pop(record["run"], None)
    return list(begun)


def end_status(kind: type[BaseException] | None) -> Status:
    """How a run ended that was left by an exception of this kind, or by none."""
    if kind is None:
        return "FINISHED"
    if issubclass(kind, StepStopped):
        return "RUNNING"
    return "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"


def _of_stream(metrics: StreamMetrics) -> dict[str, float]:
    values = {"seen_accuracy": metrics.seen_accuracy[-1], "mean_accuracy": metrics.mean_accuracy}
    if metrics.average_forgetting is not None:
        values |= {"forgetting": metrics.forgetting[-1], "average_forgetting": metrics.average_forgetting}
    if metrics.source_disjoint is not None:
        values["source_disjoint_accuracy"] = metrics.source_disjoint.seen_accuracy[-1]
    return values


def _of_step(metrics: StreamMetrics) -> dict[str, float]:
    """By task and by class; the confusion matrix is in the artifact's metrics.json."""
    tasks = {f"accuracy_task_{task}": accuracy for task, accuracy in enumerate(metrics.accuracy[-1])}
    return tasks | {f"accuracy_class/{_as_key(name)}": value for name, value in metrics.per_class.items()}


def _as_key(name: str) -> str:
    """A class name in the letters that MLflow takes."""
    return re.sub(r"[^\w \-.]", "_", name)


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}
