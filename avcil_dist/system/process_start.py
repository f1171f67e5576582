"""Start of processes: faults of the system, the surroundings of a worker, and what it imports of its parent."""

import ctypes
import faulthandler
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

from avcil_dist.errors import WorldError
from avcil_dist.system.standard_error import keep_standard_error

PR_SET_PDEATHSIG = 1


@contextmanager
def starting_process(purpose: str) -> Iterator[None]:
    """Raise WorldError, naming the purpose, when the system or another process prevents a start in the block."""
    try:
        yield
    except (EOFError, OSError, MemoryError) as error:
        reason = str(error) or "the server of processes ended as it started"
        raise WorldError(
            f"{purpose}: no process can be started ({reason}); is memory short, or a limit of processes or files "
            "reached (ulimit -a)? Run the same command again"
        ) from None


def settle_rank() -> None:
    """Prepare this process of a rank: a full or closed standard error ends nothing, and a crash is traced there.

    A crash in a library's machine code ends the process by a signal. The lines of Python that all threads then
    execute are printed first.
    """
    keep_standard_error()
    faulthandler.enable(file=2)


def settle_worker() -> None:
    """Prepare this worker process: a full or closed standard error ends nothing, and its parent handles interrupts."""
    keep_standard_error()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent dies (Linux). Its own children do not inherit this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes in the block without the module `__main__`.

    multiprocessing imports the script of a program again in each process that it starts, so a script without
    `if __name__ == "__main__"` would start itself again and again. No process of this project needs it.
    """
    before = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before
