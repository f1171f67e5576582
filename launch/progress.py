"""What a person sees of a running step: a bar on a terminal, a line in a log, a file for `avcil status`."""

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from avcil_dist import storage
from avcil_dist.tracking.events import StepTracker

LOG_LINES = 5
NOTE_SECONDS = 2.0


class SilentProgress:
    """Watches a step for the ranks that do not speak."""

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Show nothing."""

    def advance(self) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show nothing."""


class StepProgress:
    """Watches a step for rank 0: shows it, and hands each epoch's values to the tracker."""

    def __init__(self, name: str, num_steps: int, tracker: StepTracker, note_url: str | None = None) -> None:
        self.name, self.num_steps, self.tracker, self.note_url = name, num_steps, tracker, note_url
        self.noted_at = -math.inf
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Show a line."""
        self.console.print(f"{self.name}  {text}", highlight=False)

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Show the step, and where a snapshot lets it go on."""
        self.title, self.num_epochs = f"{self.name}  step {step + 1}/{self.num_steps}", num_epochs
        self.task = self.bar.add_task(self.title, total=num_batches, completed=num_done, values="")
        if num_done:
            self.console.print(f"{self.title}  goes on from iteration {num_done} of {num_batches}", highlight=False)

    def advance(self) -> None:
        """One batch further."""
        self.bar.advance(self.task)
        self._write_note()

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show and track an epoch's values."""
        self.tracker.metrics(values, position=epoch)
        shown = f"epoch {epoch + 1}/{self.num_epochs}  loss {values['loss']:.3f}"
        if "val_accuracy" in values:
            shown += f"  val {values['val_accuracy']:.1%}"
        self.bar.update(self.task, values=shown)
        self._write_note()
        is_due = (epoch + 1) % max(1, self.num_epochs // LOG_LINES) == 0 or epoch + 1 == self.num_epochs
        if is_due and not self.console.is_terminal:
            self.console.print(f"{self.title}  {shown}", highlight=False)

    def _write_note(self) -> None:
        """Where the step is, in a file, now and then."""
        now = time.monotonic()
        if self.note_url is None or now - self.noted_at < NOTE_SECONDS:
            return
        self.noted_at = now
        task = self.bar.tasks[self.task]
        note = {"done": int(task.completed), "total": int(task.total or 0), "values": task.fields["values"]}
        storage.write_json(self.note_url, note | {"time": time.time()})
