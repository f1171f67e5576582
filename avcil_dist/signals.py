"""Stop signals of a step: SIGTERM, and SIGUSR2, which SLURM sends before the end of a job.

A signal sets a flag, and the ranks vote on it: a step stops between two iterations, on all ranks at once. Signals
reach whole process groups, so the child processes of a rank must not end before it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

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
def shielding() -> Iterator[None]:
    """Block stop signals in processes that are started in the block, unless they call `listening`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
