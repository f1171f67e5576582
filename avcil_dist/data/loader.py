"""Loader of batches: a WebDataset pipeline of sampler, fetch, decode and collate, then the clip cache.

The stages work on whole batches. A batch keeps its shape when a clip is damaged: the row stays, marked as not
valid, so that all ranks have equally many batches of equal size.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import webdataset

from avcil_dist.config.schema import DataConfig
from avcil_dist.data.batch import Batch, PartialBatch
from avcil_dist.data.clip_cache import ClipCache
from avcil_dist.data.decode_pool import LethalClips, TensorPair
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.layout import BatchBuffers, ClipLayout, Faults, FeatureLayout, Layout
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.noise import InputNoise
from avcil_dist.data.plan import PADDING
from avcil_dist.data.reader import BATCHES_AHEAD, OpenReader, ShardReader
from avcil_dist.data.sampler import Request
from avcil_dist.errors import DataError


def load_batches(
    sampler: Iterable[Request],
    *,
    manifest: Manifest,
    labels: Mapping[str, int],
    data: DataConfig,
    pin: bool = False,
    clip_cache: ClipCache | None = None,
    inputs: ClipInputs | None = None,
    lethal: LethalClips | None = None,
) -> Iterator[Batch]:
    """Yield the batches of `sampler` in its order, which is independent of the number of decoding processes.

    `labels` maps a class name to its label. `pin` puts the batches in page-locked memory. Rows in `clip_cache` are
    not read, and rows that are read are added to it; a batch with rows of a cache on a device is on that device.
    `inputs` is the preparation of clips for the encoders, by default that of the settings. `lethal` is a record of the
    clips that crash a decoder (see `DecodePool`), by default a new one.
    Raises DataError and StorageError as the reader does.
    """
    return _timed(_load(sampler, manifest, labels, data, pin, clip_cache, inputs, lethal=lethal))


def load_on_device(
    sampler: Iterable[Request],
    *,
    manifest: Manifest,
    labels: Mapping[str, int],
    data: DataConfig,
    device: torch.device,
    clip_cache: ClipCache | None = None,
    inputs: ClipInputs | None = None,
    noise: InputNoise | None = None,
    lethal: LethalClips | None = None,
) -> Iterator[Batch]:
    """Yield the batches of `load_batches` on a device; the next batch is read and copied while one is used.

    Clips that are read get `noise`, if any.
    """
    batches = _load(sampler, manifest, labels, data, device.type == "cuda", clip_cache, inputs, noise, lethal)
    return _timed(_prefetched(batches, device))


def _load(
    sampler: Iterable[Request],
    manifest: Manifest,
    labels: Mapping[str, int],
    data: DataConfig,
    pin: bool,
    clip_cache: ClipCache | None,
    inputs: ClipInputs | None,
    noise: InputNoise | None = None,
    lethal: LethalClips | None = None,
) -> Iterator[Batch]:
    layout: Layout
    if manifest.kind == "clip":
        prepare = inputs or ClipInputs.of(data.clip)
        layout = ClipLayout(
            manifest,
            prepare,
            data.augment,
            num_processes=data.decode_workers,
            pin=pin,
            lethal={} if lethal is None else lethal,
            noise=noise,
        )
    else:
        layout = FeatureLayout(manifest, pin=pin, noise=noise)
    pipeline = webdataset.DataPipeline(
        lambda: iter(sampler),
        _Fetch(ShardReader(manifest, data), layout, clip_cache),
        _Decode(layout),
        _Collate(manifest, manifest.shard_labels(labels)),
    )
    partial_batches: Iterator[PartialBatch] = iter(pipeline)
    if pin:
        partial_batches = map(PartialBatch.pin_memory, partial_batches)
    if clip_cache:
        return map(clip_cache.complete, partial_batches)
    return (partial.batch for partial in partial_batches)


def _prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the device; a thread reads and copies the next one."""
    stream = _copy_stream(device)

    def load_next() -> tuple[Batch | None, torch.cuda.Event | None]:
        if stream is None:
            return next(batches, None), None
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return batch and batch.to(device), stream.record_event()

    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    if stream is None:
        _limit_to_one_thread(thread)
    try:
        coming = thread.submit(load_next)
        while True:
            batch, copied = coming.result()
            if batch is None:
                return
            coming = thread.submit(load_next)
            if copied:
                batch.wait(copied)
            yield batch
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _limit_to_one_thread(executor: ThreadPoolExecutor) -> None:
    """Let the executor's only thread compute without others.

    With two teams of OpenMP threads, more than there are cores, libgomp puts both to sleep after each operation.
    """

    def limit() -> None:
        torch.get_num_threads()  # its first use in a thread sets the number of new threads
        torch.set_num_threads(1)

    own = torch.get_num_threads()
    executor.submit(limit).result()
    torch.set_num_threads(own)  # also the number of new threads, which is the last one that any thread set


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream of all copies to a GPU. One stream orders the writes of the clip cache before its reads."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _timed(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches, each with the seconds that the consumer waited for it."""
    while True:
        started = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return
        yield replace(batch, counts={**batch.counts, "stall_seconds": time.monotonic() - started})


@dataclass
class _Fetched:
    """The bytes of a request's missing rows; `faults` names those of these rows that have none."""

    request: Request
    buffers: BatchBuffers
    faults: Faults
    counts: Mapping[str, float]


@dataclass(frozen=True)
class _Fetch:
    """Stage that reads the bytes of the rows that are not in the clip cache, some batches ahead."""

    reader: ShardReader
    layout: Layout
    clip_cache: ClipCache | None

    def __call__(self, requests: Iterable[Request]) -> Iterator[_Fetched]:
        with self.reader.open() as reader:
            coming: deque[tuple[Request, Future[_Fetched]]] = deque()
            for request in reader.ahead(map(self._without_cached, requests)):
                coming.append((request, reader.submit(self._fetch, reader, request)))
                if len(coming) > BATCHES_AHEAD:
                    yield self._finish(reader, *coming.popleft())
            while coming:
                yield self._finish(reader, *coming.popleft())

    def _without_cached(self, request: Request) -> Request:
        return self.clip_cache.mark_missing(request) if self.clip_cache else request

    def _fetch(self, reader: OpenReader, held: Request) -> _Fetched:
        request = self._without_cached(held)  # again: the cache may have more rows than when the shards were opened
        stored = request.to_read.stored_clips
        buffers = self.layout.allocate(stored)
        faults = reader.read(held, buffers.segments)
        named = {row: self._named(stored[row], fault) for row, fault in faults.items()}
        return _Fetched(request, buffers, named, {})

    def _finish(self, reader: OpenReader, held: Request, future: "Future[_Fetched]") -> _Fetched:
        fetched = future.result()
        reader.release(held)
        return replace(fetched, counts=reader.take_counts())

    def _named(self, clip: int, fault: DataError) -> DataError:
        """Return the fault with url and key of its clip."""
        manifest = self.reader.manifest
        url = manifest.url(manifest.locate(clip)[0])
        return DataError(f"{url}: clip {manifest.key(clip)}: {str(fault).removeprefix(f'{url}: ')}")


@dataclass(frozen=True)
class _Decode:
    """Stage that decodes bytes to tensors, some batches ahead; a clip that cannot be decoded is added to the faults."""

    layout: Layout

    def __call__(self, batches: Iterable[_Fetched]) -> Iterator[tuple[_Fetched, TensorPair]]:
        coming: deque[tuple[_Fetched, Callable[[], TensorPair]]] = deque()
        try:
            for fetched in batches:
                seeds = fetched.request.to_read.augment_seeds
                coming.append((fetched, self.layout.decode(fetched.buffers, fetched.faults, seeds)))
                if len(coming) > self.layout.batches_ahead(len(fetched.request.clips)):
                    yield _finish(*coming.popleft())
            while coming:
                yield _finish(*coming.popleft())
        finally:
            self.layout.close()


def _finish(fetched: _Fetched, decoded: Callable[[], TensorPair]) -> tuple[_Fetched, TensorPair]:
    return fetched, decoded()


@dataclass(frozen=True)
class _Collate:
    """Stage that adds the labels and the state of all rows."""

    manifest: Manifest
    shard_labels: np.ndarray

    def __call__(self, batches: Iterable[tuple[_Fetched, TensorPair]]) -> Iterator[PartialBatch]:
        for fetched, (visual, audio) in batches:
            request, faults = fetched.request, fetched.faults
            is_read = np.ones(len(request.clips), dtype=bool) if request.missing is None else request.missing
            is_clip = request.clips != PADDING
            labels = np.where(is_clip, self.shard_labels[self.manifest.shards_of(request.clips)], 0)
            valid = is_clip.copy()
            valid[np.flatnonzero(is_read)[list(faults)]] = False
            batch = Batch(
                visual,
                audio,
                torch.from_numpy(labels),
                torch.from_numpy(valid),
                request.num_current,
                tuple(str(faults[row]) for row in sorted(faults)),
                fetched.counts,
                request.clips,
            )
            yield PartialBatch(batch, is_read)
