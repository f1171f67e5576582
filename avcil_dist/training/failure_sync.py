"""One fault for all ranks: when one fails, the others end within seconds, with its message.

A rank that fails leaves the others waiting in a collective, where no exception reaches them. So
each rank has a thread that looks at the process group's store; the rank that fails leaves its
error there, and a rank that does not come out of its own accord is ended.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from avcil_dist import errors
from avcil_dist.errors import AvcilError, RankError, StepStopped
from avcil_dist.exit_codes import USER_ERROR
from avcil_dist.world import World

KEY = "avcil/fault"
POLL_SECONDS, GRACE_SECONDS = 0.25, 3.0

Report = Callable[[AvcilError], None]


def print_fault(error: AvcilError) -> None:
    """To the log of this rank."""
    sys.stderr.write(f"avcil: {error}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def propagate_failures(store: TCPStore, world: World, report: Report = print_fault) -> Iterator[None]:
    """In the block, an exception of one rank becomes one of all.

    A rank that gets out of the block by itself, as when its collective breaks, raises the first rank's
    error; one that does not is ended with exit code 2, after `report` was called with that error. What is no
    AvcilError is a bug: the rank that has it keeps its traceback, the others raise a RankError that names it.
    """
    if world.size == 1:
        yield
        return
    watch = _Watch(store, world, report)
    try:
        yield
    except (StepStopped, KeyboardInterrupt, SystemExit):
        watch.stop()
        raise
    except Exception as error:
        theirs = watch.settle(error)
        if theirs is None:
            raise
        raise theirs from None
    watch.stop()


class _Watch:
    """The thread that looks, and what the rank says to the others."""

    def __init__(self, store: TCPStore, world: World, report: Report) -> None:
        self._store, self._world, self._report = store, world, report
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(store.clone(),), name="faults", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._ended.set()
        self._thread.join()

    def settle(self, error: Exception) -> AvcilError | None:
        """Tell the others of this rank's error, or return the one that was there before it."""
        with contextlib.suppress(dist.DistError):  # the store is gone: rank 0 has ended, and so will all
            mine = _encode(error, self._world.rank)
            first = self._store.compare_set(KEY, "", mine).decode()
            if first != mine:
                self.stop()
                return _decode(first)
            self._wait_until_seen()
        self.stop()
        return None

    def _wait_until_seen(self) -> None:
        """The store must outlive the news: it goes with rank 0."""
        others = [_seen_by(rank) for rank in range(self._world.size) if rank != self._world.rank]
        deadline = time.monotonic() + GRACE_SECONDS
        while not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)

    def _look(self, store: TCPStore) -> None:
        try:
            while not self._ended.wait(POLL_SECONDS):
                if store.check([KEY]):
                    self._end(_decode(store.get(KEY).decode()), store)
                    return
        except dist.DistError:
            return  # the store is gone

    def _end(self, error: AvcilError, store: TCPStore) -> None:
        store.set(_seen_by(self._world.rank), "")
        if not self._ended.wait(GRACE_SECONDS):
            self._report(error)
            os._exit(USER_ERROR)


def _encode(error: Exception, rank: int) -> str:
    is_typed = isinstance(error, AvcilError)
    kind = type(error).__name__ if is_typed else ""
    text = str(error) if is_typed else f"rank {rank} failed: {type(error).__name__}: {error}; its log has the traceback"
    return json.dumps([kind, " ".join(text.split())])


def _decode(said: str) -> AvcilError:
    kind, text = json.loads(said)
    known = getattr(errors, kind, None) if kind else None
    return known(text) if isinstance(known, type) and issubclass(known, AvcilError) else RankError(text)


def _seen_by(rank: int) -> str:
    return f"{KEY}/seen/{rank}"
