"""Observers of a step: progress bars, progress files, trackers, measurements. They change nothing in it."""

from collections.abc import Mapping, Sequence


class Observer:
    """Observer of one step on one rank. All methods do nothing; a subclass overrides those it needs."""

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Training begins: `num_batches` batches in all epochs, `num_done` of them already done in a snapshot."""

    def begin_test(self, num_batches: int) -> None:
        """The test of the trained network begins: `num_batches` batches."""

    def advance(self) -> None:
        """A batch is done: of training, or of the test after `begin_test`."""

    def message(self, text: str) -> None:
        """A line for the log."""

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        """`iteration` iterations are done. `values` are those of the last one, and rates since the last call.

        It is called every `tracking.every` iterations and at the end of an epoch.
        """

    def system(self, seconds: float, values: Mapping[str, float]) -> None:
        """Load of the machines, `seconds` after the beginning of the step in this process. Another thread calls it."""

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """An epoch is done. `values` are its metrics by name, such as `loss/total`, of all ranks together."""


class ObserverList(Observer):
    """Several observers as one, called in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = tuple(observers)

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Call `begin` of each."""
        for observer in self.observers:
            observer.begin(step, num_epochs, num_batches, num_done)

    def begin_test(self, num_batches: int) -> None:
        """Call `begin_test` of each."""
        for observer in self.observers:
            observer.begin_test(num_batches)

    def advance(self) -> None:
        """Call `advance` of each."""
        for observer in self.observers:
            observer.advance()

    def message(self, text: str) -> None:
        """Call `message` of each."""
        for observer in self.observers:
            observer.message(text)

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Call `epoch` of each."""
        for observer in self.observers:
            observer.epoch(epoch, values)

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        """Call `iteration` of each."""
        for observer in self.observers:
            observer.iteration(iteration, values)

    def system(self, seconds: float, values: Mapping[str, float]) -> None:
        """Call `system` of each."""
        for observer in self.observers:
            observer.system(seconds, values)
