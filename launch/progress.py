"""Progress of a running step: a bar on a terminal or lines in a log, and a file that `avcil status` reads."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Annotated, Literal, Self

import click
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from avcil_dist import storage
from avcil_dist.reporting.tables import plain
from avcil_dist.streams.metrics import Count
from avcil_dist.system.log import chosen_level
from avcil_dist.text.visible import visible
from avcil_dist.training.observer import Observer
from launch.console import progress_console

Phase = Literal["training", "testing"]
LOG_LINES = 5
SECONDS_BETWEEN_WRITES = 2.0

_logger = logging.getLogger(__name__)


def print_warning(text: str) -> None:
    """Print a line on standard error."""
    click.echo(visible(text), err=True)


def log_warning(text: str) -> None:
    """Write a warning to the log of a rank."""
    _logger.warning("%s", text)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: 1:02:03, 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RemainingTime:
    """Estimate of the time that the rest of training, or of the test, takes, from the batches of this process."""

    def begin(self, num_batches: int, num_done: int) -> None:
        """Begin at `num_done` of `num_batches` batches."""
        self._total, self._first, self._done, self._started = num_batches, num_done, num_done, time.monotonic()

    def advance(self) -> None:
        """Count one batch."""
        self._done += 1

    @property
    def seconds(self) -> float | None:
        """The remaining time in seconds; None before the first batch is done."""
        own = self._done - self._first
        if not own:
            return None
        return max(0, self._total - self._done) * (time.monotonic() - self._started) / own


class _ValuesColumn(TextColumn):
    """Values of the last epoch; on a narrow terminal their end is cut, and not the counts and the remaining time."""

    def render(self, task: Task) -> Text:
        """Return the text as one line."""
        return Text(super().render(task).plain, no_wrap=True, overflow="ellipsis")


class ProgressBar(Observer):
    """Progress of a step: a bar on a terminal, else about five lines a step in the log."""

    def __init__(self, stream_name: str, num_steps: int) -> None:
        self.stream_name, self.num_steps = stream_name, num_steps
        self.console = progress_console()
        self.is_quiet = chosen_level() > logging.INFO
        self.remaining = RemainingTime()
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            _ValuesColumn("{task.fields[values]}", markup=False, table_column=Column()),
            console=self.console,
            transient=True,
            disable=self.is_quiet or not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def message(self, text: str) -> None:
        """Print a line."""
        self._print(f"{self.stream_name}  {text}")

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Show the bar; print the iteration that a snapshot continues from."""
        self.title, self.num_epochs = f"{self.stream_name}  step {step} of {self.num_steps}", num_epochs
        total = num_batches or None  # without training nothing is counted before the test
        self.task = self.bar.add_task(self.title, total=total, completed=num_done, values="")
        self.remaining.begin(num_batches, num_done)
        if num_done:
            self._print(f"{self.title}  continues from iteration {num_done} of {num_batches}")

    def begin_test(self, num_batches: int) -> None:
        """Begin the bar again, for the test."""
        self.bar.reset(self.task, total=num_batches, description=f"{self.title}  testing", values="")
        self.remaining.begin(num_batches, 0)

    def advance(self) -> None:
        """Move the bar by one batch."""
        self.bar.advance(self.task)
        self.remaining.advance()

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log the values at the level `debug`."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        _logger.debug("%s  iteration %d  %s", self.title, iteration, shown)

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show the epoch's loss and accuracy."""
        line = epoch_line(epoch, self.num_epochs, values)
        self.bar.update(self.task, values=line)
        is_due = (epoch + 1) % max(1, self.num_epochs // LOG_LINES) == 0 or epoch + 1 == self.num_epochs
        if is_due and not self.console.is_terminal:
            left = self.remaining.seconds
            self._print(f"{self.title}  {line}" + (f"  remaining {duration(left)}" if left else ""))

    def _print(self, text: str) -> None:
        if not self.console.is_terminal:
            _logger.info("%s", text)
        elif not self.is_quiet:
            self.console.print(plain(text), soft_wrap=True)


@dataclass(frozen=True)
class ProgressRecord:
    """Content of a progress file: batches of the phase done and in all, the line of the last epoch, the Unix time.

    `remaining`: the estimated seconds that the phase still takes.
    """

    done: Count
    total: Count
    values: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=1000)]
    time: Annotated[float, Field(ge=0, le=1e12)]
    remaining: Annotated[float, Field(ge=0, le=1e12)] | None = None
    phase: Phase = "training"


class ProgressFile(Observer):
    """Progress of a step in a JSON file, written at most every two seconds."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._written_at = -math.inf
        self._num_batches = self._num_done = self._num_epochs = 0
        self._line = ""
        self._phase: Phase = "training"
        self._remaining = RemainingTime()

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Start the count."""
        self._num_epochs, self._num_batches, self._num_done = num_epochs, num_batches, num_done
        self._remaining.begin(num_batches, num_done)

    def begin_test(self, num_batches: int) -> None:
        """Start the count again, for the test, and write it at once."""
        self._phase, self._num_batches, self._num_done = "testing", num_batches, 0
        self._remaining.begin(num_batches, 0)
        self._written_at = -math.inf
        self._write()

    def advance(self) -> None:
        """Count one batch."""
        self._num_done += 1
        self._remaining.advance()
        self._write()

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add the epoch's loss and accuracy."""
        self._line = epoch_line(epoch, self._num_epochs, values)
        self._write()

    def _write(self) -> None:
        now = time.monotonic()
        if now - self._written_at < SECONDS_BETWEEN_WRITES:
            return
        self._written_at = now
        remaining = self._remaining.seconds
        done, total = self._num_done, self._num_batches
        progress = ProgressRecord(done, total, self._line, time.time(), remaining, self._phase)
        storage.write_json(self.url, asdict(progress))


def epoch_line(epoch: int, num_epochs: int, values: Mapping[str, float]) -> str:
    """One line with an epoch's number, loss and validation accuracy."""
    line = f"epoch {epoch + 1}/{num_epochs}  loss {values['loss/total']:.3f}"
    return line + (f"  val {values['val/accuracy']:.1%}" if "val/accuracy" in values else "")
