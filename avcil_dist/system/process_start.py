"""Start of processes: faults of the system, and what a new process imports of the one that starts it."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

from avcil_dist.errors import WorldError


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
