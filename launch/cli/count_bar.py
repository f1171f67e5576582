"""Progress bar of a command that counts clips, shards or MiB."""

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from launch.cli.output import echo
from launch.console import progress_console

QUIET_SECONDS, LOG_SECONDS, SPEED_SECONDS = 3.0, 60.0, 180.0


class CountBar:
    """Progress bar on stderr for work of more than three seconds; outside a terminal a line every minute.

    The remaining time is estimated from the speed of the last minutes.
    """

    def __init__(self, title: str) -> None:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._console = progress_console()
        self._progress = Progress(*columns, console=self._console, speed_estimate_period=SPEED_SECONDS)
        self._title = title
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()
        self._count = 0

    def __enter__(self) -> "CountBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:  # else it would print an empty line
            self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        if self._task is None:
            if time.monotonic() - self._start < QUIET_SECONDS:
                return
            self._task = self._progress.add_task("", total=total)
            if self._console.is_terminal:
                self._progress.start()
        self._progress.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and time.monotonic() - self._last_line > LOG_SECONDS:
            self._last_line = time.monotonic()
            echo(f"{self._title}: {done} of {total}{_left(self._progress.tasks[0].time_remaining)}", err=True)

    def advance(self, total: int) -> None:
        """Show one more of `total`."""
        self._count += 1
        self.show(self._count, total)


def _left(seconds: float | None) -> str:
    """Words for a remaining time; none where it is unknown."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f", some {minutes} minutes left" if minutes > 1 else ", about a minute left or less"
