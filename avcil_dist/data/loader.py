"""Batches as a rank trains on them: a WebDataset pipeline, plan → fetch → decode → collate.

Its source is the plan, its stages work on whole batches, and a batch keeps its shape when a clip
is damaged: the row stays, marked as not valid, so that all ranks go on in step.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.utils.data
import webdataset

from avcil_dist.config.schema import DataConfig
from avcil_dist.data.batch import Batch
from avcil_dist.data.clip_cache import ClipCache, UncachedRequests
from avcil_dist.data.layout import BatchBuffers, ClipLayout, Faults, FeatureLayout, Layout, TensorPair
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import PADDING
from avcil_dist.data.reader import BATCHES_AHEAD, OpenReader, ShardReader
from avcil_dist.data.sampler import Request
from avcil_dist.errors import DataError
from avcil_dist.signals import shielding


def load_batches(
    source: Iterable[Request],
    *,
    manifest: Manifest,
    labels: Mapping[str, int],
    data: DataConfig,
    pin: bool = False,
    store: ClipCache | None = None,
) -> Iterator[Batch]:
    """The batches of `source`, in its order, whatever the number of decoding processes.

    `pin` puts them in page-locked memory. What `store` has is not read, and what is read it keeps; a batch with rows
    of a store on a device has them there. Raises DataError and StorageError as the reader does.
    """
    is_clip = manifest.kind == "clip"
    layout: Layout = ClipLayout(manifest, data.clip, data.augment) if is_clip else FeatureLayout(manifest, pin=pin)
    num_workers = data.decode_workers if is_clip else 0  # processes are for decoding
    pipeline = webdataset.DataPipeline(
        _EachWorkersShare(UncachedRequests(source, store) if store else source),
        _Fetch(ShardReader(manifest, data), layout, store),
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
    if store:
        batches = _completed(batches, source, store, manifest, labels)
    return timed(batches)


def load_on_device(
    source: Iterable[Request],
    *,
    manifest: Manifest,
    labels: Mapping[str, int],
    data: DataConfig,
    device: torch.device,
    store: ClipCache | None = None,
) -> Iterator[Batch]:
    """`load_batches`, on a device: one batch is read and brought there while the one before is used."""
    batches = load_batches(source, manifest=manifest, labels=labels, data=data, pin=device.type == "cuda", store=store)
    return timed(_one_ahead(batches, device))


def _one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    stream = _copy_stream(device)

    def bring() -> tuple[Batch | None, torch.cuda.Event | None]:
        if stream is None:
            return next(batches, None), None
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return batch and batch.to(device), stream.record_event()

    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        coming = thread.submit(bring)
        while True:
            batch, is_there = coming.result()
            if batch is None:
                return
            coming = thread.submit(bring)
            if is_there:
                batch.wait(is_there)
            yield batch
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One for all that is brought to a GPU, so that what a store keeps is there before it is looked up."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _completed(
    batches: Iterator[Batch], source: Iterable[Request], store: ClipCache, manifest: Manifest, labels: Mapping[str, int]
) -> Iterator[Batch]:
    """The batches of `source`, from those of what was missing of them."""
    shard_labels = manifest.shard_labels(labels)
    for request, read in zip(source, batches, strict=True):
        tensors = read.visual, read.audio
        store.put(read.clips, tensors, read.valid.numpy())
        is_read = np.isin(request.clips, read.clips)  # of a clip that comes twice, both rows are missing or neither
        if is_read.all():
            yield read
            continue
        visual, audio = store.whole(request.clips, is_read, tensors)
        valid = np.ones(len(is_read), dtype=bool)
        valid[is_read] = read.valid.numpy()
        yield replace(
            read,
            visual=visual,
            audio=audio,
            labels=torch.from_numpy(_labels(request.clips, manifest, shard_labels)),
            valid=torch.from_numpy(valid),
            num_current=request.num_current,
            clips=request.clips,
        )


def _labels(clips: np.ndarray, manifest: Manifest, shard_labels: np.ndarray) -> np.ndarray:
    return np.where(clips != PADDING, shard_labels[manifest.shards_of(clips)], 0)


def timed(batches: Iterator[Batch]) -> Iterator[Batch]:
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
    rows: BatchBuffers
    faults: Faults
    counts: Mapping[str, float]


@dataclass(frozen=True)
class _Fetch:
    """Clip numbers to bytes, some batches ahead of their turn."""

    reader: ShardReader
    layout: Layout
    store: ClipCache | None = None

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
        if self.store:  # it may have more than when the request was made
            request = self.store.missing(request)
        rows = self.layout.allocate(request.places)
        found = reader.read(request, rows.segments)
        faults = {row: self._named(request.places[row], fault) for row, fault in found.items()}
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

    def __call__(self, batches: Iterable[_Fetched]) -> Iterator[tuple[_Fetched, TensorPair]]:
        for fetched in batches:
            yield fetched, self.layout.decode(fetched.rows, fetched.faults, fetched.request.draw)


@dataclass(frozen=True)
class _Collate:
    """Tensors to a Batch."""

    manifest: Manifest
    shard_labels: np.ndarray

    def __call__(self, batches: Iterable[tuple[_Fetched, TensorPair]]) -> Iterator[Batch]:
        for fetched, (visual, audio) in batches:
            clips, faults = fetched.request.clips, fetched.faults
            is_clip = clips != PADDING
            labels = _labels(clips, self.manifest, self.shard_labels)
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
