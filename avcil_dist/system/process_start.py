"""Faults of the system as this program starts a process."""

from collections.abc import Iterator
from contextlib import contextmanager

from avcil_dist.errors import WorldError


@contextmanager
def starting_process(purpose: str) -> Iterator[None]:
    """Raise WorldError, naming the purpose, when the system or another process prevents a start in the block."""
    try:
        yield
    except (EOFError, ConnectionError, BlockingIOError, MemoryError) as error:
        reason = str(error) or "the server of processes ended as it started"
        raise WorldError(
            f"{purpose}: no process can be started ({reason}); is memory short, or the number of processes limited "
            "(ulimit -u)? Run the same command again"
        ) from None
