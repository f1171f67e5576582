"""Calls of an observer that cross processes: made in the process of rank 0, repeated in the one that supervises it."""

import time
from collections.abc import Mapping
from typing import Any

from avcil_dist.training.observer import Observer

SECONDS_BETWEEN_BATCHES = 0.1  # the queue is a pipe of limited size, which must not hold up a step of short batches


class CallQueue(Observer):
    """Observer that puts each call into a queue, batches as a count."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._num_batches = 0
        self._put_at = 0.0

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Put the call."""
        self._put("begin", step, num_epochs, num_batches, num_done)

    def begin_test(self, num_batches: int) -> None:
        """Put the call."""
        self._put("begin_test", num_batches)

    def advance(self) -> None:
        """Count a batch, and put the count if the last one is old enough."""
        self._num_batches += 1
        if time.monotonic() - self._put_at > SECONDS_BETWEEN_BATCHES:
            self._put_batches()

    def message(self, text: str) -> None:
        """Put the call."""
        self._put("message", text)

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        """Put the call."""
        self._put("iteration", iteration, dict(values))

    def system(self, seconds: float, values: Mapping[str, float]) -> None:
        """Put the call."""
        self._put("system", seconds, dict(values))

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Put the call."""
        self._put("epoch", epoch, dict(values))

    def _put(self, name: str, *arguments: Any) -> None:
        self._put_batches()
        self._queue.put((name, arguments))

    def _put_batches(self) -> None:
        if self._num_batches:
            self._queue.put(("advance", self._num_batches))
        self._num_batches, self._put_at = 0, time.monotonic()


def replay_calls(queue: Any, observer: Observer | None) -> None:
    """Make the calls in the queue, if there is one, on `observer`."""
    while observer is not None and not queue.empty():
        name, arguments = queue.get()
        if name == "advance":
            for _ in range(arguments):
                observer.advance()
        else:
            getattr(observer, name)(*arguments)
