"""How far the training of a step has come: what a snapshot holds beside weights and optimizer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class BestEpoch:
    """The weights that are the step's result, and the epoch they are from."""

    state: dict[str, Tensor]
    epoch: int
    val_accuracy: float | None


@dataclass
class EpochTotals:
    """What the epoch at hand has added up so far.

    `losses` are sums of the loss and its parts, scalars, equal on all ranks; `reading` is what this rank's
    reading took; `num_bad` counts damaged clips of all ranks, `faults` says what was wrong with this rank's;
    `seconds` it has taken.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    reading: Counter[str] = field(default_factory=Counter)
    num_bad: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self, reading: Mapping[str, float], faults: list[str]) -> dict[str, Any]:
        """As JSON, with `reading` and `faults` of all ranks. A float32 is a JSON number, to the last bit."""
        losses = {name: value.item() for name, value in self.losses.items()}
        return {
            "losses": losses,
            "reading": dict(reading),
            "num_bad": self.num_bad,
            "faults": faults,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], device: torch.device, *, is_main: bool) -> Self:
        """The inverse; what was summed over the ranks is rank 0's from now on."""
        losses = {name: torch.tensor(value, device=device) for name, value in record["losses"].items()}
        reading = Counter(record["reading"]) if is_main else Counter()
        faults = list(record["faults"]) if is_main else []
        return cls(losses, reading, record["num_bad"], faults, record["seconds"])


@dataclass
class TrainingState:
    """`iteration` iterations of the step are done; `best` is the best epoch so far.

    `counters` are the names of the counters of reading that were not zero in some epoch so far: only these are
    reported.
    """

    iteration: int = 0
    best: BestEpoch | None = None
    epoch: EpochTotals = field(default_factory=EpochTotals)
    counters: set[str] = field(default_factory=set)
