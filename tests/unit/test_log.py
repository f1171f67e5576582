"""Log of a rank: lines with time, host, rank and level where standard error is no terminal; levels by a variable."""

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from avcil_dist.system.log import VARIABLE, set_up_log
from launch.progress import ProgressBar, RemainingTime, duration, log_warning

VALUES = {"loss/total": 0.5, "val/accuracy": 0.25}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in ("avcil_dist", "launch")}
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def log_of(monkeypatch: pytest.MonkeyPatch, level: str) -> list[str]:
    """The lines of a step of two epochs, a warning, and another library's message, at a level."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv(VARIABLE, level)
    set_up_log(3)
    set_up_log(3)  # one handler in all
    with ProgressBar("mine", 4) as bar:
        bar.begin(0, num_epochs=2, num_batches=4, num_done=0)
        bar.advance()
        bar.iteration(1, VALUES)
        bar.epoch(0, VALUES)
    log_warning("odd\x1b[2J")
    logging.getLogger("another").info("noise")
    return sys.stderr.getvalue().splitlines()


def test_lines_have_time_host_rank_and_level_and_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    [epoch, warning] = log_of(monkeypatch, "info")
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ rank 3 INFO mine  step 0 of 4  epoch 1/2  loss 0.500  val 25.0%"
    assert re.fullmatch(pattern + r"(  remaining 0:0\d)?", epoch)
    assert warning.endswith(r" rank 3 WARNING odd\x1b[2J")


def test_quiet_logs_warnings_only_and_verbose_the_iterations_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(log_of(monkeypatch, "warning")) == 1
    [iteration, *_] = log_of(monkeypatch, "debug")
    assert iteration.endswith("DEBUG mine  step 0 of 4  iteration 1  loss/total 0.5  val/accuracy 0.25")


def test_a_terminal_shows_the_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    set_up_log(0)
    log_warning("a line")
    assert sys.stderr.getvalue() == "a line\n"


def test_the_bar_counts_the_test_by_itself_and_cuts_no_time_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar("demo-avcil-seed0", 4) as bar:
        bar.begin(1, num_epochs=2, num_batches=1500, num_done=1000)
        for _ in range(400):
            bar.advance()
        bar.epoch(0, VALUES)
        [training] = line_of(bar)
        bar.begin_test(3)
        for _ in range(3):
            bar.advance()
        [testing] = line_of(bar)
    assert re.fullmatch(r"demo-avcil-seed0  step 1 of 4 \S+\s+1400/1500 \d:\d\d:\d\d epoch 1/2 .*…\s*", training)
    assert re.fullmatch(r"demo-avcil-seed0  step 1 of 4  testing \S+\s+3/3 \d:\d\d:\d\d\s*", testing)


def line_of(bar: ProgressBar) -> list[str]:
    """The lines of the bar at 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    console.print(bar.bar.get_renderable())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_remaining_time_is_that_of_the_batches_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("launch.progress.time.monotonic", lambda: now[0])
    remaining = RemainingTime()
    remaining.begin(num_batches=100, num_done=60)
    assert remaining.seconds is None
    for _ in range(10):
        remaining.advance()
    now[0] = 120.0
    assert remaining.seconds == 60.0
    assert [duration(seconds) for seconds in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
