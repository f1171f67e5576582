"""Start of processes: faults of the system, the surroundings of a worker, and what it imports of its parent."""

import atexit
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from avcil_dist.errors import WorldError
from avcil_dist.system.signals import shielding
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


@contextmanager
def starting_worker(purpose: str) -> Iterator[None]:
    """`starting_process` for processes that their parent ends: they begin with interrupts and stop signals blocked.

    An interrupt of this process is raised at the end of the block, which records the processes that it starts.
    """
    with starting_process(purpose), shielding(signal.SIGINT):
        yield


def fork_server(preload: Sequence[str], purpose: str) -> ForkServerContext:
    """Return the context of the fork server, which imports the modules `preload` once; start the server if needed.

    Interrupts and stop signals are blocked in it and in the processes that it forks. It ends with this process.
    Raises as `starting_process` does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with starting_worker(purpose):
        forkserver.ensure_running()
    _end_with(os.getpid())
    return context


def await_fork_server(purpose: str) -> None:
    """Wait until the fork server has made its imports. An interrupt ends the wait. Raises as `starting_process`."""
    with starting_process(purpose):
        process = multiprocessing.get_context("forkserver").Process()
        process.start()
        process.join()


@functools.cache
def _end_with(owner: int) -> None:
    """End the server with this process: by itself it would first finish its imports, and hold the standard output."""

    def end() -> None:
        server: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        if server is not None and os.getpid() == owner:
            os.kill(server, signal.SIGKILL)

    atexit.register(end)


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
