"""Map of a function over items in worker processes that may crash: a crashed decoder costs one clip, not the run.

An item has elements. A worker marks each element before it starts it. When the worker crashes, a new worker takes
the item again and leaves the marked element out. A worker that is killed, as by a system that is short of memory, is
no sign against the element: the item is taken again as it was. A worker ends when no item waits for it.

Temporary folders of a worker are below one of its own, which the parent removes when the worker has ended.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from avcil_dist import storage
from avcil_dist.data.clip_bounds import limit_process
from avcil_dist.errors import AvcilError, DataError
from avcil_dist.system.process_start import await_fork_server, fork_server, settle_worker, starting_worker
from avcil_dist.system.signals import STOP_SIGNALS

Item = TypeVar("Item")
Result = TypeVar("Result")
MarkStart = Callable[[int], None]  # takes the position of the element that is started next
# takes an item, the positions of its elements that crashed a worker, and the callback to mark each element with
Work = Callable[[Item, frozenset[int], MarkStart], Result]
Progress = Callable[[int, int], None]  # takes the number done and the total
NO_CRASHES: Mapping[int, frozenset[int]] = {}

PURPOSE = "workers"  # in errors of their start
MAX_KILLS = 3  # of the workers of one item
POLL_SECONDS = 0.5
STOP_SECONDS = 5.0  # for workers to remove the files that they are writing


def map_in_workers(
    work: Work[Item, Result],
    items: Sequence[Item],
    *,
    processes: int,
    on_start: Callable[[int], None] | None = None,
    crashed: Mapping[int, frozenset[int]] = NO_CRASHES,
    on_crash: Callable[[int, frozenset[int]], None] | None = None,
) -> list[Result]:
    """Results of `work` on each item, in order, by `processes` worker processes; 0: in this process.

    `on_start` is called now and then with the number of elements started so far. `crashed` are the positions, by the
    number of their item, of elements that crashed a worker before; `on_crash` is called with the number of an item and
    all such positions after each crash. Raises the errors of `work`, and DataError when more than 3 workers of an item
    are killed, or one ends before it starts an element: then the clips are not the cause.
    """
    if processes == 0 or not items:
        return _map_here(work, items, on_start, crashed)
    return _Pool(work, items, min(processes, len(items)), on_start, crashed, on_crash).run()


def begin_worker() -> None:
    """Settle this worker process. A stop signal ends it, and so does the end of its parent, even by a kill."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # which its start has blocked
    settle_worker()
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker"

    def wait_and_exit() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _map_here(
    work: Work[Item, Result],
    items: Sequence[Item],
    on_start: Callable[[int], None] | None,
    crashed: Mapping[int, frozenset[int]],
) -> list[Result]:
    count = 0

    def mark_start(position: int) -> None:
        nonlocal count
        count += 1
        if on_start:
            on_start(count)

    return [work(item, crashed.get(number, frozenset()), mark_start) for number, item in enumerate(items)]


class _Worker:
    """One process and the number of its item; in shared memory its current position and its count of elements.

    Its temporary folders are below `place`.
    """

    def __init__(self, context: Any, work: Work[Any, Any], place: Path) -> None:
        self.item = -1
        self.folder = tempfile.mkdtemp(dir=place)
        self.position = context.Value("q", -1, lock=False)
        self.num_started = context.Value("q", 0, lock=False)
        self.connection, worker_end = context.Pipe()
        arguments = (work, worker_end, self.position, self.num_started, self.folder)
        self.process = context.Process(target=_run_worker, args=arguments, daemon=True)
        self.process.start()
        worker_end.close()  # so that a crashed worker reads as the end of the pipe

    def send(self, number: int, item: Any, crashed: frozenset[int]) -> None:
        self.item, self.position.value = number, -1
        with contextlib.suppress(ConnectionError):  # of a crashed worker; the end of its pipe is read next
            self.connection.send((item, crashed))


def _stop(workers: Sequence[_Worker]) -> None:
    """End the workers, all at a time, and remove their temporary folders."""
    for worker in workers:
        worker.process.terminate()
    end = time.monotonic() + STOP_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        shutil.rmtree(worker.folder, ignore_errors=True)


class _Pool:
    """The workers, the items that wait, and the results."""

    def __init__(
        self,
        work: Work[Any, Any],
        items: Sequence[Any],
        size: int,
        on_start: Callable[[int], None] | None,
        crashed: Mapping[int, frozenset[int]],
        on_crash: Callable[[int, frozenset[int]], None] | None,
    ) -> None:
        self.work, self.items, self.size, self.on_start, self.on_crash = work, items, size, on_start, on_crash
        self.preload = getattr(work, "func", work).__module__  # imported once, not by every process
        self.waiting = list(range(len(items)))[::-1]
        self.crashed = dict(crashed)  # per item the positions that crashed a worker
        self.kills = Counter[int]()  # per item
        self.results: dict[int, Any] = {}
        self.workers: list[_Worker] = []
        self.num_started_by_ended = 0

    def run(self) -> list[Any]:
        self.place = storage.new_temporary_folder()
        try:
            self.context = fork_server([self.preload, "torch"], PURPOSE)
            await_fork_server(PURPOSE)
            for _ in range(self.size):
                self._send_next(self._start_worker())
            while len(self.results) < len(self.items):
                by_connection = {worker.connection: worker for worker in self.workers}
                for connection in multiprocessing.connection.wait(list(by_connection), POLL_SECONDS):
                    self._receive(by_connection[connection])
                if self.on_start:
                    started = sum(worker.num_started.value for worker in self.workers)
                    self.on_start(self.num_started_by_ended + started)
        finally:
            _stop(self.workers)
            shutil.rmtree(self.place, ignore_errors=True)
        return [self.results[number] for number in range(len(self.items))]

    def _start_worker(self) -> _Worker:
        with starting_worker(PURPOSE):
            worker = _Worker(self.context, self.work, self.place)
            self.workers.append(worker)
        return worker

    def _send_next(self, worker: _Worker) -> None:
        if self.waiting:
            number = self.waiting.pop()
            worker.send(number, self.items[number], self.crashed.get(number, frozenset()))
        else:
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        _stop([worker])
        self.workers.remove(worker)
        self.num_started_by_ended += worker.num_started.value

    def _receive(self, worker: _Worker) -> None:
        """Store a worker's result and send it the next item, or replace the worker if it crashed."""
        try:
            succeeded, value = worker.connection.recv()
        except (EOFError, ConnectionError):
            self._replace(worker)
            return
        if not succeeded:
            raise value
        self.results[worker.item] = value
        self._send_next(worker)

    def _replace(self, worker: _Worker) -> None:
        """Start another worker for one that ended; its item is done again without the element that crashed it."""
        self._end(worker)
        number, position, code = worker.item, worker.position.value, worker.process.exitcode
        self.kills[number] += code == -signal.SIGKILL
        if position < 0 or self.kills[number] > MAX_KILLS:
            raise DataError(
                f"{max(self.kills[number], 1)} worker processes ended, the last with exit code {code}; "
                "is memory short? Start again with fewer --processes to continue"
            )
        if code != -signal.SIGKILL:
            self.crashed[number] = self.crashed.get(number, frozenset()) | {position}
            if self.on_crash:
                self.on_crash(number, self.crashed[number])
        self.waiting.append(number)
        self._send_next(self._start_worker())


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    """Exit as an exception, so that the files that are being written are removed."""
    raise SystemExit(128 + number)


def _run_worker(work: Work[Any, Any], connection: Any, shared_position: Any, num_started: Any, folder: str) -> None:
    """Main loop of a worker: receive an item, send its result."""
    signal.signal(signal.SIGTERM, _exit)
    begin_worker()
    import torch  # late: users of `begin_worker` alone need no torch

    storage.place_temporary_folders(folder)
    torch.set_num_threads(1)
    limit_process()

    def mark_start(position: int) -> None:
        shared_position.value = position
        num_started.value += 1

    while True:
        item, crashed = connection.recv()
        try:
            message = True, work(item, crashed, mark_start)
        except AvcilError as error:
            message = False, error
        except Exception:
            message = False, RuntimeError(traceback.format_exc())
        connection.send(message)
