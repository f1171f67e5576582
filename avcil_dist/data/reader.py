"""The bytes of clips: positional reads at the manifest's offsets. A tar is never walked.

Three ways lead to the bytes: files that the operating system reads; whole shards in a local cache
(`cache.py`), fetched ahead of the plan; ranged requests to object storage. What lies close together
is asked for at once.
"""

import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from avcil_dist import storage
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import PADDING
from avcil_dist.data.sampler import Request
from avcil_dist.data.shard_cache import ShardCache, default_folder
from avcil_dist.errors import DataError, StorageError

T = TypeVar("T")

GAP_BYTES = 64 << 10  # reading over a gap is cheaper than a further request
RUN_BYTES, RUN_BUFFERS = 16 << 20, 512
BATCHES_AHEAD = 2  # that are read while another is trained on
REQUESTS_AHEAD = 64  # at most, when they bring no new shard
COUNTS = ("read_bytes", "fetched_bytes", "cache_hits", "cache_misses", "cache_full", "retries")


@dataclass(frozen=True)
class Segment:
    """Bytes of a shard from `start` on, for the `buffers` in turn; they belong to `row` of a batch."""

    shard: int
    start: int
    buffers: Sequence[memoryview]
    row: int

    @property
    def stop(self) -> int:
        """The end of its bytes in the shard."""
        return self.start + sum(map(len, self.buffers))


class _Source(Protocol):
    """Where a shard's bytes come from."""

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers. Raises DataError where the shard is missing or cut."""

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True)
class ShardReader:
    """How to read the shards of a manifest. Picklable; files and filesystems are opened in the process that reads."""

    manifest: Manifest
    data: DataConfig

    def open(self) -> "OpenReader":
        """A reader with its threads, for use in a `with` block."""
        return OpenReader(self.manifest, self.data)


class OpenReader:
    """Reads segments with `data.read_threads` threads, and holds shards from their first use in sight to their last.

    Counts, by the names of `COUNTS`: bytes that batches took, bytes that crossed the network, shards that the cache
    had, that were fetched into it, for which it had no room, and reads that were tried again.
    """

    def __init__(self, manifest: Manifest, data: DataConfig) -> None:
        self.manifest, self.data = manifest, data
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._is_closing = False
        self._batches = ThreadPoolExecutor(BATCHES_AHEAD, thread_name_prefix="batch")
        self._threads = ThreadPoolExecutor(data.read_threads, thread_name_prefix="read")
        self._openers = ThreadPoolExecutor(max(2, data.prefetch_shards), thread_name_prefix="open")
        self._fetchers = ThreadPoolExecutor(data.read_threads, thread_name_prefix="fetch")
        self._sources: dict[tuple[int, bool], Future[_Source]] = {}
        self._users: Counter[tuple[int, bool]] = Counter()
        self._is_cached = _is_cached(manifest, data)
        self._cache = self._make_cache() if self._is_cached else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closing = True
        for pool in (self._batches, self._threads, self._openers, self._fetchers):  # each may wait for the next
            pool.shutdown(cancel_futures=True)
        for key in list(self._sources):
            self._close(key)

    def ahead(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests; shards of those to come are held, and fetched, before it is their turn.

        With a cache, as far ahead as brings `data.prefetch_shards` shards that are not held yet; else one request.
        The caller gives each request back with `release`.
        """
        coming: deque[tuple[Request, int]] = deque()
        fresh, limit = 0, REQUESTS_AHEAD if self._is_cached else 1
        remaining = iter(requests)
        while True:
            while (not coming or fresh < self.data.prefetch_shards) and len(coming) < limit:
                request = next(remaining, None)
                if request is None:
                    limit = 0
                    break
                num_new = self._hold(request)
                fresh += num_new
                coming.append((request, num_new))
            if not coming:
                return
            request, num_new = coming.popleft()
            fresh -= num_new
            yield request

    def release(self, request: Request) -> None:
        """Let go of the shards that no other request in sight needs."""
        for key in self._shards_of(request):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._close(key)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call a function, which may use `read`, in the background, for `BATCHES_AHEAD` batches at a time."""
        return self._batches.submit(function, *arguments)

    def read(self, request: Request, segments: Sequence[Segment]) -> dict[int, DataError]:
        """Fill the segments' buffers. Returns the rows whose bytes cannot be had, each with its DataError."""
        needed = {segment.shard for segment in segments}
        sources: dict[int, _Source | DataError] = {}
        for key in self._shards_of(request):
            if key[0] in needed:
                try:
                    sources[key[0]] = self._sources[key].result()
                except DataError as error:
                    sources[key[0]] = error
        waiting = deque(_runs(segments))  # the threads help themselves: a task for each run would cost more
        tasks = [
            self._threads.submit(self._read_runs, waiting, sources)
            for _ in range(min(self.data.read_threads, len(waiting)))
        ]
        faults: dict[int, DataError] = {}
        for task in tasks:
            faults |= task.result()
        return faults

    def _read_runs(
        self, waiting: deque[list[Segment]], sources: Mapping[int, _Source | DataError]
    ) -> dict[int, DataError]:
        faults: dict[int, DataError] = {}
        while True:
            try:
                run = waiting.popleft()
            except IndexError:
                return faults
            faults |= self._read_run(sources[run[0].shard], run)

    def take_counts(self) -> Mapping[str, float]:
        """What was counted since the last call."""
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return dict(taken)

    def count(self, name: str, amount: int) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += amount

    def count_retry(self) -> None:
        """Count a retry. Raises StorageError when nobody waits for what is read any more."""
        if self._is_closing:
            raise StorageError(f"{self.manifest.root}: reading was ended")
        self.count("retries", 1)

    def _read_run(self, source: _Source | DataError, run: Sequence[Segment]) -> dict[int, DataError]:
        """Read a run at once; where that fails, its segments one by one, so that a good row is not lost."""
        if isinstance(source, DataError):
            return {segment.row: source for segment in run}
        try:
            source.read(run[0].start, _buffers(run))
        except DataError as error:
            if len(run) == 1:
                return {run[0].row: error}
            faults: dict[int, DataError] = {}
            for segment in run:
                faults |= self._read_run(source, [segment])
            return faults
        self.count("read_bytes", sum(segment.stop - segment.start for segment in run))
        return {}

    def _hold(self, request: Request) -> int:
        """Start to open the shards of a request. Returns the number of those that were not held before."""
        new = [key for key in self._shards_of(request) if not self._users[key]]
        for key in new:
            self._sources[key] = self._openers.submit(self._open, *key)
        self._users.update(self._shards_of(request))
        return len(new)

    def _shards_of(self, request: Request) -> list[tuple[int, bool]]:
        """The shards of a request, and whether each is wanted whole: exemplars are few clips of many shards."""
        part = request.to_read
        current, exemplars = np.split(part.stored_clips, [part.num_current])
        of_current = set(self.manifest.shards_of(current[current != PADDING]).tolist())
        of_exemplars = set(self.manifest.shards_of(exemplars[exemplars != PADDING]).tolist()) - of_current
        return [*((shard, True) for shard in of_current), *((shard, False) for shard in of_exemplars)]

    def _open(self, number: int, is_whole: bool) -> _Source:
        url, shard = self.manifest.url(number), self.manifest.shards[number]
        if self._cache is not None:
            wanted = shard.bytes, shard.sha256
            descriptor = self._cache.open(url, *wanted) if is_whole else self._cache.find(*wanted)
            if descriptor is not None:
                return _File(url, descriptor)
        path = storage.local_path(url)
        if path is None:
            return _Ranges(url, self)
        try:
            return _File(url, os.open(path, os.O_RDONLY))
        except FileNotFoundError:
            raise DataError(f"{url}: missing") from None
        except OSError as error:
            raise DataError(f"{url}: {error.strerror}") from None

    def _close(self, key: tuple[int, bool]) -> None:
        source = self._sources.pop(key)
        if not source.cancel():
            source.add_done_callback(_close_opened)

    def _make_cache(self) -> ShardCache:
        return ShardCache(
            default_folder() if self.data.shard_cache == "auto" else Path(self.data.shard_cache),
            int(self.data.shard_cache_gigabytes * 1e9),
            executor=self._fetchers,
            retry_seconds=self.data.retry_seconds,
            count=self.count,
            on_retry=self.count_retry,
        )


@dataclass(frozen=True)
class _File:
    """A file of this machine."""

    url: str
    descriptor: int

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        while buffers:
            try:
                count = os.preadv(self.descriptor, buffers, start)
            except OSError as error:
                raise DataError(f"{self.url}: {error.strerror}") from None
            if not count:
                raise DataError(f"{self.url}: ends at byte {start}; the shard is cut")
            start += count
            buffers = _after(buffers, count)

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class _Ranges:
    """An object in a storage, asked for by ranges."""

    url: str
    reader: OpenReader

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        data = storage.read_range(
            self.url,
            start,
            start + sum(map(len, buffers)),
            seconds=self.reader.data.retry_seconds,
            on_retry=self.reader.count_retry,
        )
        self.reader.count("fetched_bytes", len(data))
        whole, place = np.frombuffer(data, dtype=np.uint8), 0
        for buffer in buffers:
            np.copyto(np.frombuffer(buffer, dtype=np.uint8), whole[place : place + len(buffer)])
            place += len(buffer)

    def close(self) -> None:
        """Nothing is held."""


def _is_cached(manifest: Manifest, data: DataConfig) -> bool:
    if data.shard_cache == "auto":
        return bool(manifest.shards) and storage.is_remote(manifest.url(0))
    return data.shard_cache != "none"


def _runs(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments in runs that are read at once: of one shard, in order, with small gaps."""
    runs: list[list[Segment]] = []
    num_buffers = stop = 0
    for segment in sorted(segments, key=lambda segment: (segment.shard, segment.start)):
        last = runs[-1] if runs else None
        joins = (
            last is not None
            and last[-1].shard == segment.shard
            and 0 <= segment.start - stop <= GAP_BYTES
            and segment.stop - last[0].start <= RUN_BYTES
            and num_buffers + len(segment.buffers) < RUN_BUFFERS
        )
        if last is not None and joins:
            last.append(segment)
            num_buffers += len(segment.buffers) + 1
        else:
            runs.append([segment])
            num_buffers = len(segment.buffers)
        stop = segment.stop
    return runs


def _buffers(run: Sequence[Segment]) -> list[memoryview]:
    """The buffers of a run, with one for each gap."""
    buffers = list(run[0].buffers)
    for before, segment in itertools.pairwise(run):
        if segment.start > before.stop:
            buffers.append(memoryview(bytearray(segment.start - before.stop)))
        buffers.extend(segment.buffers)
    return buffers


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left to fill of the buffers once `count` bytes came."""
    left = []
    for buffer in buffers:
        if count < len(buffer):
            left.append(buffer[count:])
        count = max(0, count - len(buffer))
    return left


def _close_opened(source: "Future[_Source]") -> None:
    if not source.cancelled() and source.exception() is None:
        source.result().close()
