"""Scenario: the class stream, its partition into steps, and the slice of the head of each step.

Labels are positions in the class order, so the classes of a step are one slice of the head. Steps may have unequal
sizes; nothing is derived from `label % classes_per_step`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pydantic import Field

from avcil_dist.config.schema import ScenarioConfig
from avcil_dist.errors import ConfigError
from avcil_dist.seeds import generator

# Without the characters that a terminal interprets.
ClassName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$", max_length=1000)]

MAX_SHOWN = 8  # sizes of steps in an error


@dataclass(frozen=True)
class Scenario:
    """Classes of each step, in order. Steps count from 0. Raises ValueError for a class that is in it twice."""

    steps: Annotated[
        tuple[Annotated[tuple[ClassName, ...], Field(min_length=1)], ...], Field(min_length=1, max_length=100_000)
    ]

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is in it twice")

    @property
    def num_steps(self) -> int:
        """Number of incremental steps."""
        return len(self.steps)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """All classes in order of arrival; the label of a class is its position here."""
        return tuple(name for step in self.steps for name in step)

    @cached_property
    def labels(self) -> dict[str, int]:
        """Class name to label."""
        return {name: label for label, name in enumerate(self.classes)}

    def new(self, step: int) -> tuple[str, ...]:
        """Return the classes that arrive at `step`."""
        return self.steps[step]

    def old(self, step: int) -> tuple[str, ...]:
        """Return the classes that arrived before `step`."""
        return self.classes[: self.num_old(step)]

    def seen(self, step: int) -> tuple[str, ...]:
        """Return the old and new classes of `step`."""
        return self.classes[: self.num_seen(step)]

    def num_old(self, step: int) -> int:
        """Return the number of classes that arrived before `step`."""
        return sum(len(names) for names in self.steps[:step])

    def num_seen(self, step: int) -> int:
        """Return the number of classes that arrived up to and including `step`."""
        return self.num_old(step + 1)

    def head_slices(self, step: int) -> tuple[slice, ...]:
        """Return the head's slice of each task 0 … `step`."""
        return tuple(slice(self.num_old(task), self.num_seen(task)) for task in range(step + 1))


def configured_scenario(settings: ScenarioConfig, available: Sequence[str]) -> Scenario:
    """Return the scenario that the settings define over the `available` classes. Raises as `make_scenario` does."""
    return make_scenario(
        available,
        classes_per_step=settings.classes_per_step,
        classes=settings.classes,
        shuffle=settings.shuffle_seed,
    )


def make_scenario(
    available: Sequence[str],
    *,
    classes_per_step: int | Sequence[int],
    classes: Sequence[str] | None = None,
    shuffle: int | None = None,
) -> Scenario:
    """Partition classes into steps.

    `available` are the classes of the data in listed order; `classes` selects some of them, in its own order;
    `shuffle` is a seed that reorders them. `classes_per_step` is the number of classes of every step, or a list with
    the number of each step. Raises ConfigError when a class would be in no step.
    """
    order = list(available if classes is None else classes)
    unknown = [name for name in order if name not in set(available)]
    if unknown:
        raise ConfigError(
            f"scenario.classes: {unknown[0]!r} is not in the data; its classes are {', '.join(available)}"
        )
    if len(set(order)) != len(order):
        twice = next(name for name in order if order.count(name) > 1)
        raise ConfigError(f"scenario.classes: {twice!r} is listed twice")
    if shuffle is not None:
        order = [order[i] for i in generator(shuffle, "class order").permutation(len(order))]
    if isinstance(classes_per_step, int):
        sizes = [classes_per_step] * -(-len(order) // classes_per_step)
    else:
        sizes = list(classes_per_step)
    if sum(sizes) < len(order):
        raise ConfigError(
            f"scenario.classes_per_step: {len(sizes)} steps hold {sum(sizes)} of {len(order)} classes: "
            f"{order[sum(sizes)]!r} is in no step; lengthen the steps or leave it out of scenario.classes"
        )
    if sum(sizes) > len(order):
        raise ConfigError(
            f"scenario.classes_per_step: the steps need {sum(sizes)} classes, there are {len(order)}; list "
            f"the sizes of the steps, such as {_fitting(sizes, len(order))}"
        )
    bounds = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return Scenario(tuple(tuple(order[a:b]) for a, b in itertools.pairwise(bounds)))


def _fitting(sizes: Sequence[int], num_classes: int) -> str:
    """Return a list of the first sizes, the last one reduced, that hold so many classes; a long one is abbreviated."""
    fitting: list[int] = []
    for size in sizes:
        if left := num_classes - sum(fitting):
            fitting.append(min(size, left))
    shown = [str(size) for size in fitting]
    return f"[{','.join(shown if len(shown) <= MAX_SHOWN else [*shown[:2], '…', *shown[-1:]])}]"
