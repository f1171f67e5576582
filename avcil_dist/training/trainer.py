"""The training loop of a step: epochs of batches, the global loss, the epoch that is selected."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from avcil_dist.config import Config
from avcil_dist.data.loader import Batch, TrainingSource, load_batches
from avcil_dist.data.plan import rows_at_a_time
from avcil_dist.data.reader import COUNTS
from avcil_dist.errors import DataError
from avcil_dist.methods.base import Method
from avcil_dist.models.network import Network
from avcil_dist.training.distributed import collect_texts, gather_rows
from avcil_dist.training.engine import Engine
from avcil_dist.training.evaluate import Evaluator
from avcil_dist.training.iteration import iterate
from avcil_dist.training.replay import exemplars_at_hand
from avcil_dist.training.teacher import Teacher


class Observer(Protocol):
    """Who watches a step: a progress bar, a tracker, nobody."""

    def begin(self, step: int, num_epochs: int, num_batches: int) -> None:
        """The step starts: so many epochs of so many batches."""

    def advance(self) -> None:
        """A batch, of training or of evaluation, is done."""

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """An epoch is done; `values` are its mean losses, accuracy, speed, and what reading took, of all ranks."""


@dataclass(frozen=True)
class Selected:
    """The weights that are the step's result, and the epoch they are from."""

    state: dict[str, Tensor]
    epoch: int
    val_accuracy: float | None


@dataclass
class Trainer:
    """The training loop of a step."""

    config: Config
    method: Method
    teacher: Teacher | None
    evaluator: Evaluator
    source: TrainingSource
    observer: Observer
    device: torch.device
    num_bad: int = field(default=0, init=False)
    faults: list[str] = field(default_factory=list, init=False)

    @cached_property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self.source.epoch_batches(0))

    def train(self, student: Network) -> Selected:
        """Train all epochs and select one of them."""
        labels, pin = self.evaluator.scenario.labels, self.device.type == "cuda"
        with exemplars_at_hand(self.source) as (source, manifest):
            batches = load_batches(source, manifest=manifest, labels=labels, data=self.config.data, pin=pin)
            return self._train(self._make_engine(student), batches)

    def _train(self, engine: Engine, batches: Iterator[Batch]) -> Selected:
        step, num_epochs = self.source.step, self.config.optim.epochs
        self.observer.begin(step, num_epochs, num_epochs * self.per_epoch)
        best: Selected | None = None
        for epoch in range(num_epochs):
            started = time.monotonic()
            values = self._epoch(engine, itertools.islice(batches, self.per_epoch))
            values["clips_per_second"] = self.per_epoch * self.config.optim.batch / (time.monotonic() - started)
            best = self._select(engine, epoch, best, values)
            self.observer.epoch(epoch, values)
        engine.close()
        assert best is not None
        return best

    def _make_engine(self, student: Network) -> Engine:
        optim, world = self.config.optim, self.source.world
        replayed = optim.replay_batch if len(self.source.exemplars) else 0
        rows = rows_at_a_time(optim.batch // world.size, replayed // world.size, self.config.engine.micro_batch)
        return Engine(student, optim=optim, config=self.config.engine, rows=rows, world=world, device=self.device)

    def _epoch(self, engine: Engine, batches: Iterator[Batch]) -> dict[str, float]:
        """One pass over the step's clips; returns the mean of each part of the loss."""
        engine.network.train()
        self.num_bad, self.faults = 0, []
        sums: dict[str, Tensor] = {}
        reading: Counter[str] = Counter()
        for batch in batches:
            reading.update(batch.counts)
            for name, value in self._iteration(engine, batch.to(self.device)).items():
                sums[name] = sums.get(name, 0) + value.detach()
            self._check_faults(batch)
            self.observer.advance()
        means = {name: value.item() / self.per_epoch for name, value in sums.items()}
        means |= {"damaged_clips": float(self.num_bad)} if self.num_bad else {}
        return means | self._of_all_ranks(reading)

    def _of_all_ranks(self, reading: Mapping[str, float]) -> dict[str, float]:
        """What reading the epoch took, summed over the ranks."""
        names = (*COUNTS, "stall_seconds")
        own = torch.tensor([[reading.get(name, 0.0) for name in names]], dtype=torch.float64, device=self.device)
        return dict(zip(names, gather_rows(own, 1).sum(dim=0).tolist(), strict=True))

    def _iteration(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        done = iterate(engine, batch, method=self.method, teacher=self.teacher)
        self.num_bad += done.num_bad
        return done.parts

    def _check_faults(self, batch: Batch) -> None:
        """Stop, on all ranks at once, when more clips are damaged than an epoch may skip."""
        self.faults.extend(batch.faults)
        allowed = self.config.data.max_bad_fraction * self.per_epoch * self.config.optim.batch
        if self.num_bad > allowed:
            named = collect_texts(tuple(self.faults))[0]
            raise DataError(
                f"{self.num_bad} damaged clips in an epoch, data.max_bad_fraction allows {allowed:.0f}; "
                f"the first: {named}"
            )

    def _select(self, engine: Engine, epoch: int, best: Selected | None, values: dict[str, float]) -> Selected | None:
        """Keep the better of the best so far and this epoch; ties keep the first."""
        if self.config.optim.select == "last":
            is_last = epoch == self.config.optim.epochs - 1
            return Selected(engine.state(), epoch, None) if is_last else None
        step = self.source.step
        predicted = self.evaluator(engine.network, self.method, "val", step, on_batch=lambda: None)
        values["val_accuracy"] = predicted.accuracy
        if best is None or best.val_accuracy is None or predicted.accuracy > best.val_accuracy:
            return Selected(engine.state(), epoch, predicted.accuracy)
        return best
