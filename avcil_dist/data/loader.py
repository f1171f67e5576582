"""Batches as a rank trains on them: a WebDataset pipeline, plan → fetch → decode → collate.

Its source is the plan, its stages work on whole batches, and a batch keeps its shape when a clip
is damaged: the row stays, marked as not valid, so that all ranks go on in step.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.utils.data
import webdataset
from torch import Tensor

from avcil_dist.config import DataConfig, OptimConfig
from avcil_dist.data.layout import ClipLayout, Faults, FeatureLayout, Layout, Pair, Rows
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import NO_CLIPS, PADDING, plan_epoch, plan_replay, rank_share, replay_passes
from avcil_dist.data.reader import BATCHES_AHEAD, Draw, OpenReader, Request, ShardReader
from avcil_dist.errors import DataError
from avcil_dist.seeds import derive_seed
from avcil_dist.signals import shielding
from avcil_dist.world import World


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch: `num_current` rows of the current step, then exemplars.

    `visual` (B, …) and `audio` (B, …) are pictures and filterbanks, or features; `labels` (B,)
    are positions in the class order; `valid` (B,) is false for padding and damaged clips, whose
    rows are zero; `faults` say what was damaged; `counts` what reading took since the batch before, by
    the names of `reader.COUNTS`, and "stall_seconds", the time that its taker waited for it; `clips` (B,)
    are numbers in the manifest.
    """

    visual: Tensor
    audio: Tensor
    labels: Tensor
    valid: Tensor
    num_current: int
    faults: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    clips: np.ndarray = field(default_factory=lambda: NO_CLIPS)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("visual", "audio", "labels", "valid")
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies that overlap with compute."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("visual", "audio", "labels", "valid")}
        return replace(self, **pinned)


@dataclass(frozen=True)
class TrainingSource:
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

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """The epoch's global batches, (batches, optim.batch)."""
        return plan_epoch(
            self.manifest,
            self.classes,
            seed=self.seed,
            step=self.step,
            epoch=epoch,
            global_batch=self.optim.batch,
            canonical_nodes=self.data.canonical_nodes,
            window=self.data.window,
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
                    "global_batch": self.optim.replay_batch,
                }
                replay = plan_replay(self.exemplars, seed=self.seed, step=self.step, **span)
                rows.append(rank_share(replay, self.world.rank, self.world.size))
                passes = replay_passes(len(self.exemplars), **span)
                epochs.append(rank_share(passes, self.world.rank, self.world.size))
            for clips, of_rows in zip(np.concatenate(rows, axis=1), np.concatenate(epochs, axis=1), strict=True):
                draw = Draw(seed, of_rows) if self.data.augment.is_on else None
                yield Request(clips, current.shape[1], draw)


@dataclass(frozen=True)
class FixedSource:
    """One pass over given batches (batches, rows), as evaluation makes."""

    batches: np.ndarray

    def __iter__(self) -> Iterator[Request]:
        return (Request(clips, num_current=len(clips)) for clips in self.batches)


def load_batches(
    source: Iterable[Request], *, manifest: Manifest, labels: Mapping[str, int], data: DataConfig, pin: bool = False
) -> Iterator[Batch]:
    """The batches of `source`, in its order, whatever the number of decoding processes.

    `pin` puts them in page-locked memory. Raises DataError and StorageError as the reader does.
    """
    is_clip = manifest.kind == "clip"
    layout: Layout = ClipLayout(manifest, data.clip, data.augment) if is_clip else FeatureLayout(manifest, pin=pin)
    num_workers = data.workers if is_clip else 0  # processes are for decoding
    pipeline = webdataset.DataPipeline(
        _EachWorkersShare(source),
        _Fetch(ShardReader(manifest, data), layout),
        _Decode(layout),
        _Collate(manifest, manifest.shard_labels(labels)),
    )
    loader = webdataset.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="forkserver" if num_workers else None,
        pin_memory=pin,
    )
    with shielding():  # a worker that dies of a stop signal would take the snapshot with it
        batches = iter(loader)
    return _timed(batches)


def _timed(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each with the seconds that its taker waited for it."""
    while True:
        started = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield replace(batch, counts={**batch.counts, "stall_seconds": time.monotonic() - started})


class _EachWorkersShare(torch.utils.data.IterableDataset):
    """Worker w of W takes batches w, w + W, …: the loader asks the workers in turn, so the order stays."""

    def __init__(self, source: Iterable[Request]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Request]:
        worker = torch.utils.data.get_worker_info()
        return itertools.islice(self.source, worker.id, None, worker.num_workers) if worker else iter(self.source)


@dataclass
class _Fetched:
    """A batch whose bytes are there, but for the rows in `faults`."""

    request: Request
    rows: Rows
    faults: Faults
    counts: Mapping[str, float]


@dataclass(frozen=True)
class _Fetch:
    """Clip numbers to bytes, some batches ahead of their turn."""

    reader: ShardReader
    layout: Layout

    def __call__(self, requests: Iterable[Request]) -> Iterator[_Fetched]:
        with self.reader.open() as reader:
            coming: deque[tuple[Request, Future[_Fetched]]] = deque()
            for request in reader.ahead(requests):
                coming.append((request, reader.submit(self._fetch, reader, request)))
                if len(coming) > BATCHES_AHEAD:
                    yield self._finish(reader, *coming.popleft())
            while coming:
                yield self._finish(reader, *coming.popleft())

    def _fetch(self, reader: OpenReader, request: Request) -> _Fetched:
        rows = self.layout.lay_out(request.clips)
        found = reader.read(request, rows.segments)
        faults = {row: self._named(request.clips[row], fault) for row, fault in found.items()}
        return _Fetched(request, rows, faults, {})

    def _finish(self, reader: OpenReader, request: Request, future: "Future[_Fetched]") -> _Fetched:
        fetched = future.result()
        reader.release(request)
        return replace(fetched, counts=reader.take_counts())

    def _named(self, clip: int, fault: DataError) -> DataError:
        manifest = self.reader.manifest
        url = manifest.url(manifest.locate(clip)[0])
        return DataError(f"{url}: clip {manifest.key(clip)}: {str(fault).removeprefix(f'{url}: ')}")


@dataclass(frozen=True)
class _Decode:
    """Bytes to tensors; a clip that cannot be decoded becomes its DataError."""

    layout: Layout

    def __call__(self, batches: Iterable[_Fetched]) -> Iterator[tuple[_Fetched, Pair]]:
        for fetched in batches:
            yield fetched, self.layout.decode(fetched.rows, fetched.faults, fetched.request.draw)


@dataclass(frozen=True)
class _Collate:
    """Tensors to a Batch."""

    manifest: Manifest
    shard_labels: np.ndarray

    def __call__(self, batches: Iterable[tuple[_Fetched, Pair]]) -> Iterator[Batch]:
        for fetched, (visual, audio) in batches:
            clips, faults = fetched.request.clips, fetched.faults
            is_clip = clips != PADDING
            labels = np.where(is_clip, self.shard_labels[self.manifest.shards_of(clips)], 0)
            valid = is_clip & ~np.isin(np.arange(len(clips)), list(faults))
            yield Batch(
                visual,
                audio,
                torch.from_numpy(labels),
                torch.from_numpy(valid),
                fetched.request.num_current,
                tuple(str(faults[row]) for row in sorted(faults)),
                fetched.counts,
                clips,
            )
