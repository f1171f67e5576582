"""Signals that ask a step to stop: SIGTERM, and SIGUSR2, with which SLURM warns of the end of a job.

A signal only sets a flag, which the ranks vote on: a step stops between two iterations, on all ranks
at once. Whole process groups are signalled, so what a rank has started must not die of it first.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Ask it to stop."""
        self._is_set = True

    def is_set(self) -> bool:
        """Whether it was asked to."""
        return self._is_set


@contextmanager
def listening() -> Iterator[StopRequest]:
    """A request that a stop signal sets, for the length of the block; the main thread enters it.

    A signal that came while this process was being started counts.
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
    """Processes that are started in the block do not take stop signals, unless they listen for them themselves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
