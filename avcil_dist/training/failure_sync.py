"""Failure propagation: when one rank fails, all ranks end within seconds, with its message.

The other ranks wait in a collective, where no exception reaches them. So each rank has a thread that polls the
process group's store. The failing rank publishes its error there, and a rank that does not leave its collective
by itself is ended.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from avcil_dist.errors import AvcilError, StepStopped
from avcil_dist.exit_codes import USER_ERROR
from avcil_dist.training.error_codec import decode_error, encode_error
from avcil_dist.world import World

KEY = "avcil/fault"
POLL_SECONDS, GRACE_SECONDS = 0.25, 3.0

_logger = logging.getLogger(__name__)

Report = Callable[[AvcilError], None]

_monitor: ContextVar["_Monitor | None"] = ContextVar("monitor", default=None)  # of the block that this thread runs


def print_fault(error: AvcilError) -> None:
    """Print an error to the log of this rank."""
    _logger.error("avcil: %s", error)


@contextlib.contextmanager
def propagate_failures(store: TCPStore, world: World, report: Report = print_fault) -> Iterator[None]:
    """Re-raise an exception of any rank in the block on every rank.

    A rank that leaves the block by itself, for example because its collective fails, raises the error that was
    published first. A rank that does not is ended with exit code 2 after a call of `report` with that error. Any
    exception but an AvcilError is a bug: its rank logs the traceback, the others raise a RankError that names it.
    """
    if world.size == 1:
        yield
        return
    monitor = _Monitor(store, world, report)
    token = _monitor.set(monitor)
    try:
        with publishing_failures():
            yield
    finally:
        _monitor.reset(token)
        monitor.stop()


@contextlib.contextmanager
def publishing_failures() -> Iterator[None]:
    """Publish an exception where it arises, before the blocks around this one clean up, which may take long.

    Within `propagate_failures`, whose errors it raises. Elsewhere it does nothing.
    """
    try:
        yield
    except StepStopped:
        raise
    except Exception as error:
        monitor = _monitor.get()
        published = monitor.publish(error) if monitor else None
        if published is None:
            raise
        raise published from None


class _Monitor:
    """Thread that polls for errors of other ranks, and publication of this rank's error."""

    def __init__(self, store: TCPStore, world: World, report: Report) -> None:
        self._store, self._world, self._report = store, world, report
        self._has_read = False  # the error of another rank: one of this rank may be its consequence
        self._raised: Exception | None = None  # what this rank raises once it has published
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, args=(store.clone(),), name="failure-sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._ended.set()
        self._thread.join()

    def publish(self, error: Exception) -> AvcilError | None:
        """Publish this rank's error; return the error of another rank if that was published before.

        The monitor stops first: this rank leaves its block by itself, and has time to clean up.
        """
        if error is self._raised:
            return None  # published where it arose
        self.stop()
        if not isinstance(error, AvcilError) and not self._has_read:
            _logger.error("rank %d failed:", self._world.rank, exc_info=error)
        published = None
        with contextlib.suppress(dist.DistError):  # the store is gone: rank 0 has ended, and all others will
            mine = encode_error(error, self._world.rank)
            first = self._store.compare_set(KEY, "", mine).decode(errors="replace")
            published = None if first == mine else decode_error(first)
            self._wait_until_seen()
        self._raised = published or error
        return published

    def _wait_until_seen(self) -> None:
        """Wait until every rank has read the error: rank 0 hosts the store and must not exit before."""
        self._store.set(_seen_by(self._world.rank), "")
        all_ranks = [_seen_by(rank) for rank in range(self._world.size)]
        deadline = time.monotonic() + GRACE_SECONDS
        while not self._store.check(all_ranks) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)

    def _poll(self, store: TCPStore) -> None:
        try:
            while not self._ended.wait(POLL_SECONDS):
                if store.check([KEY]):
                    self._has_read = True
                    self._end(decode_error(store.get(KEY).decode(errors="replace")), store)
                    return
        except dist.DistError:
            return  # the store is gone

    def _end(self, error: AvcilError, store: TCPStore) -> None:
        store.set(_seen_by(self._world.rank), "")
        if not self._ended.wait(GRACE_SECONDS):
            self._report(error)
            os._exit(USER_ERROR)


def _seen_by(rank: int) -> str:
    return f"{KEY}/seen/{rank}"
