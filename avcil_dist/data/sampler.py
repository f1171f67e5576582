"""Samplers: the sequence of batches that a rank reads, each a request for clips by number."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_weights import ClipWeights
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import (
    NO_CLIPS,
    count_batches,
    plan_epoch,
    plan_replay,
    rank_columns,
    rank_share,
    replay_passes,
)
from avcil_dist.seeds import derive_seed
from avcil_dist.world import World


@dataclass(frozen=True)
class AugmentSeeds:
    """Seeds of the augmentation of a batch: one seed of the step, and the epoch of each row."""

    seed: int
    epochs: np.ndarray

    def seed_of(self, row: int, key: str) -> int:
        """Return the seed of a row. It depends on clip and epoch, not on batch, rank or process."""
        return derive_seed(self.seed, "clip", key, int(self.epochs[row]))


@dataclass(frozen=True)
class Request:
    """Clip numbers (B,) of a rank's batch, in row order; the first `num_current` rows are of the current step.

    `augment_seeds` None: no augmentation. `copies` (B,) are the numbers of copies that are read instead of `clips`.
    `missing` (B,) masks the rows to read, the others are in the clip cache; None: all rows.
    """

    clips: np.ndarray
    num_current: int
    augment_seeds: AugmentSeeds | None = None
    copies: np.ndarray | None = None
    missing: np.ndarray | None = None

    @property
    def stored_clips(self) -> np.ndarray:
        """Numbers (B,) of the clips whose bytes are read."""
        return self.clips if self.copies is None else self.copies

    @property
    def to_read(self) -> "Request":
        """The request for the missing rows alone."""
        rows = self.missing
        if rows is None:
            return self
        seeds = self.augment_seeds
        return Request(
            self.clips[rows],
            int(rows[: self.num_current].sum()),
            None if seeds is None else replace(seeds, epochs=seeds.epochs[rows]),
            None if self.copies is None else self.copies[rows],
        )


@dataclass(frozen=True)
class TrainingSampler:
    """All training batches of a step for one rank, from batch `start` to the end of the last epoch.

    `exemplars` form replay batches beside the current clips; `joined` exemplars are mixed into the current clips.
    With `weights`, clips are drawn in proportion to theirs. With augmentation, the epoch of an exemplar in a replay
    batch is its number of passes over the exemplars.
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
    weights: ClipWeights | None = None

    @property
    def clips(self) -> np.ndarray:
        """All clips that may occur in a batch, ascending."""
        current = self.manifest.clips(self.classes, "train")
        others = np.concatenate([self.exemplars, self.joined])
        return np.union1d(current, others) if len(others) else current

    def expected_counts(self, labels: Mapping[str, int], num_classes: int) -> np.ndarray:
        """Return the clips of each class in a global batch, on average, (num_classes,) float64.

        `labels` are positions by class name.
        """
        of_shard = self.manifest.shard_labels(labels)

        def counts(clips: np.ndarray) -> np.ndarray:
            return np.bincount(
                of_shard[self.manifest.shards_of(clips)], self._weights_of(clips), minlength=num_classes
            ).astype(np.float64)

        shards = self.manifest.shard_numbers(self.classes, "train")
        of_shards = np.diff(self.manifest.first_clips)[shards]
        if self.weights is not None:
            of_shards = of_shards * self.weights.of_shard[shards]
        current = counts(self.joined)
        np.add.at(current, of_shard[shards], of_shards)
        total = np.zeros(num_classes)
        for of_class, rows in (
            (current, self.optim.global_batch),
            (counts(self.exemplars), self.optim.global_replay_batch),
        ):
            if of_class.any():
                total += rows / of_class.sum() * of_class
        return total

    def _weights_of(self, clips: np.ndarray) -> np.ndarray | None:
        return None if self.weights is None else self.weights.lookup(clips, self.manifest.shards_of(clips))

    @property
    def num_current(self) -> int:
        """Number of clips of an epoch: all but the exemplars of replay batches."""
        return self.manifest.num_clips(self.classes, "train") + len(self.joined)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        optim, data = self.optim, self.data
        return count_batches(self.num_current, global_batch=optim.global_batch, canonical_nodes=data.canonical_nodes)

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """Return the rank's columns of the global batches of an epoch, (batches, optim.global_batch / ranks)."""
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
            columns=rank_columns(self.optim.global_batch, self.world.rank, self.world.size),
            weights=self.weights,
        ).batches

    def __iter__(self) -> Iterator[Request]:
        batches_per_epoch = self.batches_per_epoch
        for epoch in range(self.start // batches_per_epoch, self.optim.epochs):
            yield from self._requests(epoch, first=max(self.start - epoch * batches_per_epoch, 0))

    def _requests(self, epoch: int, first: int) -> Iterator[Request]:
        """Yield the requests of an epoch from batch `first` on."""
        batches = self.epoch_batches(epoch)
        current = batches[first:]
        num_current = current.shape[1]
        replayed = passes = np.empty((len(current), 0), dtype=np.int64)
        if len(self.exemplars):
            span = {
                "first": epoch * len(batches) + first,
                "count": len(current),
                "global_batch": self.optim.global_replay_batch,
            }
            weights = self._weights_of(self.exemplars)
            planned = plan_replay(self.exemplars, seed=self.seed, step=self.step, weights=weights, **span)
            replayed, passes = self._share(planned), self._share(replay_passes(len(self.exemplars), **span))
        seed = derive_seed(self.seed, "augment", self.step)
        for row, clips in enumerate(current):  # one at a time: an epoch may have millions of clips
            seeds = None
            if self.data.augment.is_on:
                seeds = AugmentSeeds(seed, np.concatenate([np.full(num_current, epoch), passes[row]]))
            yield Request(np.concatenate([clips, replayed[row]]), num_current, seeds)

    def _share(self, batches: np.ndarray) -> np.ndarray:
        return rank_share(batches, self.world.rank, self.world.size)


@dataclass(frozen=True)
class FixedSampler:
    """One pass over given batches (batches, rows), for evaluation and inference."""

    batches: np.ndarray

    def __iter__(self) -> Iterator[Request]:
        return (Request(clips, num_current=len(clips)) for clips in self.batches)
