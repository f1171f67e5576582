"""Work on many items in processes that may die: a decoder that crashes takes its clip with it, not the run.

A worker says before each element of its item which one is at hand. When the worker dies, that element is
called lethal, a fresh worker takes the item again, and leaves the lethal element out.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from avcil_dist.errors import AvcilError, DataError
from avcil_dist.signals import STOP_SIGNALS

Item = TypeVar("Item")
Result = TypeVar("Result")
Begin = Callable[[int], None]
# an item, the places of its lethal elements, and what to call before each element with its place
Work = Callable[[Item, frozenset[int], Begin], Result]
Progress = Callable[[int, int], None]

MAX_LETHAL = 3
POLL_SECONDS = 0.5


def map_in_workers(
    work: Work[Item, Result], items: Sequence[Item], *, processes: int, begun: Callable[[int], None] | None = None
) -> list[Result]:
    """The result of `work` on each item, in order, made by `processes` worker processes; 0: in this process.

    `begun` is called now and then with the number of elements that were begun so far. Raises what `work`
    raises, and DataError when more than 3 workers die of one item: then it is not the clips.
    """
    if processes == 0:
        return _run_here(work, items, begun)
    return _Pool(work, items, min(processes, len(items)), begun).run()


def exit_with_parent() -> None:
    """Let this worker process end when the process that started it is killed; it would wait for work for ever."""
    starter = multiprocessing.parent_process()
    assert starter is not None, "called in a worker"

    def wait_and_end() -> None:
        multiprocessing.connection.wait([starter.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _run_here(work: Work[Item, Result], items: Sequence[Item], begun: Callable[[int], None] | None) -> list[Result]:
    count = 0

    def begin(place: int) -> None:
        nonlocal count
        count += 1
        if begun:
            begun(count)

    return [work(item, frozenset(), begin) for item in items]


class _Worker:
    """One process, the item that it is at, and what it shares: the place and the number of begun elements."""

    def __init__(self, context: Any, work: Work[Any, Any]) -> None:
        self.place = context.Value("q", -1, lock=False)
        self.count = context.Value("q", 0, lock=False)
        self.item = -1
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs, self.place, self.count), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead worker reads as the end of the pipe

    def send(self, number: int, item: Any, lethal: frozenset[int]) -> None:
        self.item, self.place.value = number, -1
        with contextlib.suppress(ConnectionError):  # of a dead worker; the end of its pipe is read next
            self.connection.send((item, lethal))

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


class _Pool:
    """The workers, which item is where, and what has come back."""

    def __init__(
        self, work: Work[Any, Any], items: Sequence[Any], size: int, begun: Callable[[int], None] | None
    ) -> None:
        self.work, self.items, self.size, self.begun = work, items, size, begun
        self.context = multiprocessing.get_context("forkserver")
        preload = getattr(work, "func", work).__module__  # imported once, not by every process
        self.context.set_forkserver_preload([preload])
        self.waiting = list(range(len(items)))[::-1]
        self.lethal: dict[int, frozenset[int]] = {}
        self.results: dict[int, Any] = {}
        self.workers: list[_Worker] = []
        self.count_of_the_dead = 0

    def run(self) -> list[Any]:
        try:
            for _ in range(self.size):
                self._give_work(self._start_worker())
            while len(self.results) < len(self.items):
                by_connection = {worker.connection: worker for worker in self.workers}
                for connection in multiprocessing.connection.wait(list(by_connection), POLL_SECONDS):
                    self._take(by_connection[connection])
                if self.begun:
                    self.begun(self.count_of_the_dead + sum(worker.count.value for worker in self.workers))
        finally:
            for worker in self.workers:
                worker.end()
        return [self.results[number] for number in range(len(self.items))]

    def _start_worker(self) -> _Worker:
        worker = _Worker(self.context, self.work)
        self.workers.append(worker)
        return worker

    def _give_work(self, worker: _Worker) -> None:
        if self.waiting:
            number = self.waiting.pop()
            worker.send(number, self.items[number], self.lethal.get(number, frozenset()))
        else:
            worker.item = -1

    def _take(self, worker: _Worker) -> None:
        """What a worker sent, or what its death means."""
        try:
            succeeded, value = worker.connection.recv()
        except (EOFError, ConnectionError):
            self._bury(worker)
            return
        if not succeeded:
            raise value
        self.results[worker.item] = value
        self._give_work(worker)

    def _bury(self, worker: _Worker) -> None:
        worker.end()
        self.workers.remove(worker)
        self.count_of_the_dead += worker.count.value
        number, place = worker.item, worker.place.value
        lethal = self.lethal.get(number, frozenset()) | {place}
        if place < 0 or len(lethal) > MAX_LETHAL:
            raise DataError(
                f"{len(lethal)} working processes died, the last with exit code {worker.process.exitcode}; "
                "is memory short? Start again with fewer --processes to continue"
            )
        self.lethal[number] = lethal
        self.waiting.append(number)
        self._give_work(self._start_worker())


def _serve(work: Work[Any, Any], connection: Any, place: Any, count: Any) -> None:
    """A worker's life: take an item, send what came of it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a fork server that shields ranks hands its mask on
    import torch  # late: who only wants `exit_with_parent` need not wait for it

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter is interrupted too, and ends its workers
    exit_with_parent()
    torch.set_num_threads(1)

    def begin(element: int) -> None:
        place.value = element
        count.value += 1

    while True:
        item, lethal = connection.recv()
        try:
            answer = True, work(item, lethal, begin)
        except AvcilError as error:
            answer = False, error
        except Exception:
            answer = False, RuntimeError(traceback.format_exc())
        connection.send(answer)
