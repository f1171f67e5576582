"""Samplers: the sequence of batches that a rank reads, as requests for clips by number."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from avcil_dist.config.schema import DataConfig, OptimConfig
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import NO_CLIPS, plan_epoch, plan_replay, rank_share, replay_passes
from avcil_dist.seeds import derive_seed
from avcil_dist.world import World


@dataclass(frozen=True)
class AugmentSeeds:
    """What the random choices for a batch's rows depend on: a seed of the step, and each row's epoch."""

    seed: int
    epochs: np.ndarray

    def seed_of(self, row: int, key: str) -> int:
        """The seed of a row: its clip's in that epoch, whatever batch, rank or process it is in."""
        return derive_seed(self.seed, "clip", key, int(self.epochs[row]))


@dataclass(frozen=True)
class Request:
    """The clip numbers of a rank's batch, in row order; the first `num_current` are of the current step.

    Clips are varied as `draw` says, or not at all. They are read at `copies` (numbers), where these are given.
    """

    clips: np.ndarray
    num_current: int
    draw: AugmentSeeds | None = None
    copies: np.ndarray | None = None

    @property
    def places(self) -> np.ndarray:
        """The numbers of the clips that are read."""
        return self.clips if self.copies is None else self.copies

    def part(self, rows: np.ndarray) -> "Request":
        """The request for some of its rows (a mask)."""
        draw = None if self.draw is None else replace(self.draw, epochs=self.draw.epochs[rows])
        copies = None if self.copies is None else self.copies[rows]
        return Request(self.clips[rows], int(rows[: self.num_current].sum()), draw, copies)


@dataclass(frozen=True)
class TrainingSampler:
    """All training batches of a step for one rank, from batch `start` on, epoch after epoch.

    `exemplars` come in batches of their own beside the current clips; `joined` ones are among them. Where clips are
    varied, the passes over the exemplars are their epochs.
    """

    manifest: Manifest
    classes: tuple[str, ...]
    exemplars: np.ndarray
    data: DataConfig
    optim: OptimConfig
    seed: int
    step: int
    world: World
    start: int = 0
    joined: np.ndarray = field(default_factory=lambda: NO_CLIPS)

    @property
    def clips(self) -> np.ndarray:
        """All clips that may come in a batch, ascending."""
        current = self.manifest.clips(self.classes, "train")
        return np.unique(np.concatenate([current, self.exemplars, self.joined]))

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """The epoch's global batches, (batches, optim.global_batch)."""
        return plan_epoch(
            self.manifest,
            self.classes,
            seed=self.seed,
            step=self.step,
            epoch=epoch,
            global_batch=self.optim.global_batch,
            canonical_nodes=self.data.canonical_nodes,
            window=self.data.shuffle_window,
            exemplars=self.joined,
        ).batches

    def __iter__(self) -> Iterator[Request]:
        per_epoch = len(self.epoch_batches(0))
        seed = derive_seed(self.seed, "augment", self.step)
        for epoch in range(self.start // per_epoch, self.optim.epochs):
            first = max(self.start - epoch * per_epoch, 0)
            current = rank_share(self.epoch_batches(epoch)[first:], self.world.rank, self.world.size)
            rows, epochs = [current], [np.full_like(current, epoch)]
            if len(self.exemplars):
                span = {
                    "first": epoch * per_epoch + first,
                    "count": len(current),
                    "global_batch": self.optim.global_replay_batch,
                }
                replay = plan_replay(self.exemplars, seed=self.seed, step=self.step, **span)
                rows.append(rank_share(replay, self.world.rank, self.world.size))
                passes = replay_passes(len(self.exemplars), **span)
                epochs.append(rank_share(passes, self.world.rank, self.world.size))
            for clips, of_rows in zip(np.concatenate(rows, axis=1), np.concatenate(epochs, axis=1), strict=True):
                draw = AugmentSeeds(seed, of_rows) if self.data.augment.is_on else None
                yield Request(clips, current.shape[1], draw)


@dataclass(frozen=True)
class FixedSampler:
    """One pass over given batches (batches, rows), as evaluation makes."""

    batches: np.ndarray

    def __iter__(self) -> Iterator[Request]:
        return (Request(clips, num_current=len(clips)) for clips in self.batches)
