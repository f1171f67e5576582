"""Stop signals of a step: SIGTERM, and SIGUSR2, which SLURM sends before the end of a job.

A signal sets a flag, and the ranks vote on it: a step stops between two iterations, on all ranks at once. Signals
reach whole process groups, so the child processes of a rank must not end before it. SIGINT interrupts a command.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from avcil_dist.exit_codes import INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Flag of a requested stop."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Request a stop."""
        self._is_set = True

    def is_set(self) -> bool:
        """Whether a stop was requested."""
        return self._is_set


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Yield a request that a stop signal sets while the block runs. Call it in the main thread.

    A signal that arrived while this process was starting counts.
    """
    request = StopRequest()
    before = {number: signal.signal(number, lambda *_: request.set()) for number in STOP_SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shielding(*others: signal.Signals) -> Iterator[None]:
    """Block stop signals in processes that are started in the block, unless they call `listening`; and other signals.

    A process that imports for seconds, and that its parent ends, is to be started with SIGINT among them.
    """
    resource_tracker.ensure_running()  # its start, which may be that of the first process, unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, *others))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for the first SIGINT only, so that what the block ends is ended in full.

    The second one is ignored, also after the block; the third ends the process at once. Call it in the main thread.
    Nothing changes where SIGINT is ignored, such as below nohup.
    """
    count = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise KeyboardInterrupt
        if count > 2:
            os._exit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if not count:
            signal.signal(signal.SIGINT, before)
