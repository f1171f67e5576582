"""Plan: the assignment of clips to the batches of an epoch. Pure functions of numbers.

The plan is independent of the world size; a rank takes its slice of every global batch. So each clip occurs once
per epoch, all ranks have equally many batches, the global batches are the same on 1, 2 or 64 ranks, and resuming at
batch b means starting at `batches[b:]`.

The step's clips, in an order of shards fixed for the step, are divided into `canonical_nodes` equal ranges; each
global batch takes an equal share of each range. A machine serves whole ranges, so it reads the same part of the
data in every epoch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avcil_dist.data.clip_weights import ClipWeights, draw
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shuffle import PartsInOrder, window_shuffle
from avcil_dist.errors import ConfigError
from avcil_dist.seeds import generator

PADDING = -1
NO_CLIPS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class EpochPlan:
    """`batches` (batches, global_batch) of clip numbers; `rest`: the clips of the incomplete last batch, not used."""

    batches: np.ndarray
    rest: np.ndarray


def plan_epoch(
    manifest: Manifest,
    classes: Iterable[str],
    *,
    seed: int,
    step: int,
    epoch: int,
    global_batch: int,
    canonical_nodes: int,
    window: int,
    exemplars: np.ndarray = NO_CLIPS,
    columns: range | None = None,
    weights: ClipWeights | None = None,
) -> EpochPlan:
    """Plan one epoch over the training clips of `classes`, mixed with `exemplars` (clip numbers) of other classes.

    `window` is the number of shards whose clips are shuffled together within a range. `columns` are those columns of
    the global batches that are planned, all by default; time is that of the ranges that they are from, memory that of
    the columns, and `rest` is of these ranges. With `weights`, a clip comes in proportion to its weight among those of
    its range, instead of once. Raises ConfigError when `global_batch` is not a multiple of `canonical_nodes`.
    """
    columns = range(global_batch) if columns is None else columns
    segments: list[range | np.ndarray] = [*_whole_shards(manifest, classes), *_by_shard(manifest, exemplars)]
    counts = np.array([len(segment) for segment in segments], dtype=np.int64)
    num_batches = count_batches(int(counts.sum()), global_batch=global_batch, canonical_nodes=canonical_nodes)
    names = [manifest.class_of(segment[0]) for segment in segments]
    order = _spread(names, counts, generator(seed, "shards", step))
    segments, counts = [segments[i] for i in order], counts[order]

    share = global_batch // canonical_nodes
    numbers = range(columns.start // share, -(-columns.stop // share))
    batches, rest = [], []
    for number in numbers:
        shuffled = _shuffle_range(
            manifest,
            _part(segments, counts, number, canonical_nodes),
            generator(seed, "clips", step, epoch, number),
            window,
            weights,
        )
        own = range(max(columns.start - number * share, 0), min(columns.stop - number * share, share))
        of_range, remaining = _columns(shuffled, num_batches, share, own)
        batches.append(of_range)
        rest.append(remaining)
    return EpochPlan(batches[0] if len(batches) == 1 else np.concatenate(batches, axis=1), np.concatenate(rest))


def count_batches(num_clips: int, *, global_batch: int, canonical_nodes: int) -> int:
    """Return the number of batches of an epoch over so many clips.

    Raises ConfigError when `global_batch` is not a multiple of `canonical_nodes`.
    """
    if global_batch % canonical_nodes:
        raise ConfigError(f"batch {global_batch} is not a multiple of {canonical_nodes} canonical nodes")
    return num_clips // canonical_nodes // (global_batch // canonical_nodes)


def plan_replay(
    exemplars: np.ndarray,
    *,
    seed: int,
    step: int,
    first: int,
    count: int,
    global_batch: int,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return batches `first` … `first + count - 1` of exemplars, (count, global_batch), counted over the whole step.

    The exemplars are repeated in passes, reshuffled for each pass; a batch may span two passes. With `weights` (E,), an
    exemplar comes in proportion to its weight, instead of once in each pass.
    """
    start, stop, size = first * global_batch, (first + count) * global_batch, len(exemplars)
    passes = range(start // size, -(-stop // size))
    stream = [_one_pass(exemplars, weights, generator(seed, "replay", step, number)) for number in passes]
    offset = start - passes.start * size
    return np.concatenate([exemplars[:0], *stream])[offset : offset + count * global_batch].reshape(count, global_batch)


def _one_pass(exemplars: np.ndarray, weights: np.ndarray | None, random: np.random.Generator) -> np.ndarray:
    drawn = exemplars if weights is None else exemplars[draw(weights, random)]
    return drawn[random.permutation(len(drawn))]


def replay_passes(num_exemplars: int, *, first: int, count: int, global_batch: int) -> np.ndarray:
    """Return the pass over the exemplars of each row of `plan_replay`, (count, global_batch); the first pass is 0."""
    return (np.arange(first * global_batch, (first + count) * global_batch) // num_exemplars).reshape(count, -1)


def plan_evaluation(clips: np.ndarray, global_batch: int, world_size: int = 1) -> np.ndarray:
    """Return all clips in their order, (batches, global_batch), the last batch filled up with PADDING.

    `global_batch` is rounded up to a multiple of `world_size`, so that any number of ranks can share the batches.
    """
    global_batch = -(-global_batch // world_size) * world_size
    num_batches = -(-len(clips) // global_batch)
    padded = np.full(num_batches * global_batch, PADDING, dtype=np.int64)
    padded[: len(clips)] = clips
    return padded.reshape(num_batches, global_batch)


def rank_share(batches: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return a rank's columns of global batches (batches, global_batch): equal, contiguous, in rank order.

    Raises ConfigError when the ranks cannot have equal shares.
    """
    columns = rank_columns(batches.shape[1], rank, world_size)
    return batches[:, columns.start : columns.stop]


def rank_columns(global_batch: int, rank: int, world_size: int) -> range:
    """Return the numbers of a rank's columns of global batches. Raises ConfigError as `rank_share` does."""
    check_batch_fits("global batch", global_batch, world_size)
    share = global_batch // world_size
    return range(rank * share, (rank + 1) * share)


def check_batch_fits(setting: str, global_batch: int, world_size: int) -> None:
    """Check that ranks have equal shares of a batch. Raises ConfigError, naming the numbers of ranks that fit."""
    if global_batch % world_size:
        fitting = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
        raise ConfigError(
            f"{setting}={global_batch} cannot be shared by {world_size} processes; "
            f"it fits {', '.join(map(str, fitting))} processes, or choose a multiple of {world_size}"
        )


def rows_at_a_time(current: int, replayed: int, most: int | None) -> int:
    """Return the clips of a micro-batch: an equal part of a rank's current clips and exemplars, at most `most`.

    Raises ConfigError that lists the possible numbers when even the smallest such part is more.
    """
    common = math.gcd(current, replayed)
    fitting = [(current + replayed) // parts for parts in range(1, common + 1) if common % parts == 0]
    chosen = next((rows for rows in fitting if most is None or rows <= most), None)
    if chosen is None:
        raise ConfigError(
            f"engine.micro_batch={most}: a rank has {current} current clips and {replayed} exemplars of a batch, which "
            f"have equal parts of {', '.join(map(str, reversed(fitting)))} clips; choose one of these, or other batches"
        )
    return chosen


def _spread(names: Sequence[str], counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return an order of segments that spreads each class evenly: any part of it has the classes in proportion."""
    positions = np.empty(len(names))
    of_class: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        of_class.setdefault(name, []).append(index)
    for indices in of_class.values():
        shuffled = np.array(indices)[random.permutation(len(indices))]
        before = np.cumsum(counts[shuffled]) - counts[shuffled]
        positions[shuffled] = (before + random.random() * counts[shuffled]) / counts[shuffled].sum()
    return np.argsort(positions, kind="stable")


def _whole_shards(manifest: Manifest, classes: Iterable[str]) -> Iterator[range]:
    """Yield the training clips of each shard of the classes."""
    firsts = manifest.first_clips.tolist()
    return (range(firsts[number], firsts[number + 1]) for number in manifest.shard_numbers(classes, "train"))


def _part(
    segments: Sequence[range | np.ndarray], counts: np.ndarray, number: int, parts: int
) -> Iterator[range | np.ndarray]:
    """Yield part `number` of the clips of all segments, as `numpy.array_split` divides them into `parts`."""
    ends = np.cumsum(counts)
    size, larger = divmod(int(counts.sum()), parts)
    start = number * size + min(number, larger)
    stop = start + size + (number < larger)
    for index in range(int(np.searchsorted(ends, start, side="right")), len(segments)):
        first = int(ends[index] - counts[index])
        if first >= stop:
            return
        yield segments[index][max(start - first, 0) : stop - first]


def _by_shard(manifest: Manifest, clips: np.ndarray) -> list[np.ndarray]:
    """Return the clips in ascending order, divided by shard."""
    ordered = np.sort(clips)
    shards = np.searchsorted(manifest.first_clips, ordered, side="right")
    return [part for part in np.split(ordered, np.flatnonzero(np.diff(shards)) + 1) if len(part)]


def _shuffle_range(
    manifest: Manifest,
    parts: Iterable[range | np.ndarray],
    random: np.random.Generator,
    window: int,
    weights: ClipWeights | None,
) -> Iterator[np.ndarray]:
    """Yield the clips of a range in blocks: its parts of shards reordered, their clips shuffled over `window` parts."""
    segments: list[range | np.ndarray] = []
    shards: list[int] = []
    for part in parts:
        shard = manifest.locate(int(part[0]))[0]
        if shards and shards[-1] == shard:
            segments[-1] = np.concatenate([segments[-1], part])
        else:
            segments.append(part)
            shards.append(shard)
    if not segments:
        return
    counts = np.array([len(segment) for segment in segments])
    order = _spread([manifest.shards[shard].class_name for shard in shards], counts, random)
    stream = PartsInOrder([segments[i] for i in order])
    drawn = None
    if weights is not None:
        clips = stream.clips(np.arange(len(stream)))
        drawn = draw(weights.lookup(clips, manifest.shards_of(clips)), random)
    for places in window_shuffle(len(stream), window * len(stream) / len(segments), random):
        yield stream.clips(places if drawn is None else drawn[places])


def _columns(blocks: Iterable[np.ndarray], num_batches: int, share: int, own: range) -> tuple[np.ndarray, np.ndarray]:
    """Return columns `own` of a range's batches (num_batches, share), whose rows follow one another, and the rest."""
    batches = np.empty(num_batches * len(own), dtype=np.int64)
    rest, first, filled = [NO_CLIPS], 0, 0
    for block in blocks:
        numbers = np.arange(first, first + len(block))
        first += len(block)
        whole = block[numbers < num_batches * share]
        if len(whole) < len(block):
            rest.append(block[len(whole) :].copy())  # a view would keep the block
        if len(own) < share:
            columns = numbers[: len(whole)] % share
            whole = whole[(columns >= own.start) & (columns < own.stop)]
        batches[filled : filled + len(whole)] = whole
        filled += len(whole)
    return batches.reshape(num_batches, len(own)), np.concatenate(rest)
