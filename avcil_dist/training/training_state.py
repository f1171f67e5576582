"""Progress of a step's training: the best epoch, the totals of an unfinished one, and their records in a snapshot."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from avcil_dist.streams.commit import encode_json
from avcil_dist.streams.metrics import Accuracy, Count, Epoch, EpochMetrics
from avcil_dist.streams.tensor_parts import Parts


class BestEpochRecord(BaseModel):
    """Number and validation accuracy of the best epoch, as `training.json` has them."""

    epoch: Epoch
    val_accuracy: Accuracy | None
    num_ties: Count


class TotalsRecord(BaseModel):
    """Totals of an unfinished epoch, as `training.json` has them (see `EpochTotals`)."""

    model_config = ConfigDict(allow_inf_nan=False)

    losses: dict[str, float]
    reading: dict[str, float]
    num_bad: Count
    faults: list[str]
    seconds: Annotated[float, Field(ge=0)]


class TrainingRecord(BaseModel):
    """Content of `training.json`."""

    iteration: Count
    best: BestEpochRecord | None
    totals: TotalsRecord
    counters: list[str]
    epochs: tuple[EpochMetrics, ...] = ()
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True)
class BestEpoch:
    """The epoch that becomes the step's result: its number and its accuracy on the validation clips.

    `parts` are this rank's parts of its weights, in host memory: no rank has more than its share. `num_ties` later
    epochs have the same accuracy. `num_epochs`: those that were trained, once training is over, and `epochs` their
    metrics.
    """

    parts: Parts
    epoch: int
    val_accuracy: float | None
    num_ties: int = 0
    num_epochs: int = 0
    epochs: tuple[EpochMetrics, ...] = ()


@dataclass
class EpochTotals:
    """Sums over the iterations of an unfinished epoch.

    `losses` are sums of the loss and its parts, scalars, equal on all ranks. `reading` holds this rank's counts of
    reading. `num_bad` is the number of damaged clips of all ranks, `faults` are the descriptions of this rank's.
    `seconds` is the time spent.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    reading: Counter[str] = field(default_factory=Counter)
    num_bad: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self, reading: Mapping[str, float], faults: list[str]) -> dict[str, Any]:
        """The JSON form, with `reading` and `faults` of all ranks. A float32 is a JSON number, to the last bit."""
        losses = {name: value.item() for name, value in self.losses.items()}
        return {
            "losses": losses,
            "reading": dict(reading),
            "num_bad": self.num_bad,
            "faults": faults,
            "seconds": self.seconds,
        }

    @classmethod
    def from_record(cls, totals: TotalsRecord, device: torch.device, *, is_main: bool) -> Self:
        """The inverse of `to_dict`. Rank 0 takes over the sums over the ranks."""
        losses = {name: torch.tensor(value, device=device) for name, value in totals.losses.items()}
        reading = Counter(totals.reading) if is_main else Counter()
        faults = totals.faults if is_main else []
        return cls(losses, reading, totals.num_bad, faults, totals.seconds)


@dataclass
class TrainingState:
    """Progress of a step's training: `iteration` iterations are done, `best` is the best epoch so far.

    `counters` are the names of the reading counters that were not zero in some epoch so far: only these are
    reported. `epochs` are the metrics of the finished epochs.
    """

    iteration: int = 0
    best: BestEpoch | None = None
    epoch: EpochTotals = field(default_factory=EpochTotals)
    counters: set[str] = field(default_factory=set)
    epochs: list[EpochMetrics] = field(default_factory=list)


def encode_training(state: TrainingState, totals: dict[str, Any], seconds: float) -> bytes:
    """Return the content of `training.json`; `totals` are as `EpochTotals.to_dict` returns them."""
    best = state.best
    epoch = best and {"epoch": best.epoch, "val_accuracy": best.val_accuracy, "num_ties": best.num_ties}
    return encode_json(
        {
            "iteration": state.iteration,
            "best": epoch,
            "totals": totals,
            "counters": sorted(state.counters),
            "epochs": list(map(asdict, state.epochs)),
            "seconds": seconds,
        }
    )
