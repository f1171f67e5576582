"""Reader of shards: positional reads of clips at the manifest's offsets, without scanning the tar.

A shard is read in one of three ways: as a local file, as a whole shard in the local cache (`shard_cache.py`), which
is fetched before its first use, or by range requests to object storage. Neighbouring reads are merged into one.
"""

import errno
import itertools
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from avcil_dist import storage
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import PADDING
from avcil_dist.data.sampler import Request
from avcil_dist.data.shard_cache import ShardCache, cache_folder
from avcil_dist.errors import DataError, StorageError

T = TypeVar("T")

GAP_BYTES = 64 << 10  # a larger read that includes a gap is cheaper than a second request
RUN_BYTES, RUN_BUFFERS = 16 << 20, 512
BATCHES_AHEAD = 2  # batches that are read while another is trained on
REQUESTS_AHEAD = 64  # limit where further requests need no new shard
COUNTS = ("read_bytes", "fetched_bytes", "cache_hits", "cache_misses", "cache_full", "retries")


@dataclass(frozen=True)
class Segment:
    """Bytes of a shard from `start` on, to be read into `buffers` in order; they belong to `row` of a batch."""

    shard: int
    start: int
    buffers: Sequence[memoryview]
    row: int

    @property
    def stop(self) -> int:
        """Offset of the first byte after the segment."""
        return self.start + sum(map(len, self.buffers))


class _Shard(Protocol):
    """An open shard."""

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers. Raises DataError where the shard is missing or cut."""

    def close(self) -> None:
        """Release the file, if any."""


@dataclass(frozen=True)
class ShardReader:
    """Reader of a manifest's shards, not yet open. Picklable: the process that reads opens files and filesystems."""

    manifest: Manifest
    data: DataConfig

    def open(self) -> "OpenReader":
        """Return a reader with its threads, for use in a `with` block."""
        return OpenReader(self.manifest, self.data)


class OpenReader:
    """Reads segments with `data.read_threads` threads. Shards stay open from their first to their last known use.

    Counters, by the names in `COUNTS`: bytes read for batches, bytes fetched over the network, shards found in the
    cache, shards fetched into it, shards that did not fit into it, and retries of reads.
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
        self._shards: dict[tuple[int, bool], Future[_Shard]] = {}
        self._users: Counter[tuple[int, bool]] = Counter()
        self._is_cached = _is_cached(manifest, data)
        self._cache = self._make_cache() if self._is_cached else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closing = True
        # in this order: a task of a pool may wait for tasks of the next pool
        for pool in (self._batches, self._threads, self._openers, self._fetchers):
            pool.shutdown(cancel_futures=True)
        for key in list(self._shards):
            self._close(key)

    def ahead(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests; open, and fetch, the shards of later requests in advance.

        With a cache, looks ahead until `data.prefetch_shards` new shards are being opened; otherwise one request.
        The caller passes each request to `release` after use.
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
        """Close the shards that no other request returned by `ahead` needs."""
        for key in self._shards_of(request):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._close(key)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call a function, which may use `read`, in a thread; `BATCHES_AHEAD` calls run at a time."""
        return self._batches.submit(function, *arguments)

    def read(self, request: Request, segments: Sequence[Segment]) -> dict[int, DataError]:
        """Fill the buffers of the segments. Returns the rows that cannot be read, each with its DataError."""
        needed = {segment.shard for segment in segments}
        shards: dict[int, _Shard | DataError] = {}
        for key in self._shards_of(request):
            if key[0] in needed:
                try:
                    shards[key[0]] = self._shards[key].result()
                except DataError as error:
                    shards[key[0]] = error
        waiting = deque(_runs(segments))  # a queue shared by the threads: one task per run would cost more
        tasks = [
            self._threads.submit(self._read_runs, waiting, shards)
            for _ in range(min(self.data.read_threads, len(waiting)))
        ]
        faults: dict[int, DataError] = {}
        for task in tasks:
            faults |= task.result()
        return faults

    def _read_runs(
        self, waiting: deque[list[Segment]], shards: Mapping[int, _Shard | DataError]
    ) -> dict[int, DataError]:
        faults: dict[int, DataError] = {}
        while True:
            try:
                run = waiting.popleft()
            except IndexError:
                return faults
            faults |= self._read_run(shards[run[0].shard], run)

    def take_counts(self) -> Mapping[str, float]:
        """Return the counters since the last call, and reset them."""
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return dict(taken)

    def count(self, name: str, amount: int) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += amount

    def count_retry(self) -> None:
        """Count a retry. Raises StorageError when the reader is closing."""
        if self._is_closing:
            raise StorageError(f"{self.manifest.root}: the reader was closed")
        self.count("retries", 1)

    def _read_run(self, shard: _Shard | DataError, run: Sequence[Segment]) -> dict[int, DataError]:
        """Read a run at once; where that fails, segment by segment, so that only the damaged rows are lost."""
        if isinstance(shard, DataError):
            return {segment.row: shard for segment in run}
        try:
            shard.read(run[0].start, _buffers(run))
        except DataError as error:
            if len(run) == 1:
                return {run[0].row: error}
            faults: dict[int, DataError] = {}
            for segment in run:
                faults |= self._read_run(shard, [segment])
            return faults
        self.count("read_bytes", sum(segment.stop - segment.start for segment in run))
        return {}

    def _hold(self, request: Request) -> int:
        """Start to open the shards of a request. Returns the number of those that were not held before."""
        new = [key for key in self._shards_of(request) if not self._users[key]]
        for key in new:
            self._shards[key] = self._openers.submit(self._open, *key)
        self._users.update(self._shards_of(request))
        return len(new)

    def _shards_of(self, request: Request) -> list[tuple[int, bool]]:
        """Return the shards of a request, and whether each is cached whole: exemplars are few clips of many shards."""
        part = request.to_read
        current, exemplars = np.split(part.stored_clips, [part.num_current])
        of_current = set(self.manifest.shards_of(current[current != PADDING]).tolist())
        of_exemplars = set(self.manifest.shards_of(exemplars[exemplars != PADDING]).tolist()) - of_current
        return [*((shard, True) for shard in of_current), *((shard, False) for shard in of_exemplars)]

    def _open(self, number: int, is_whole: bool) -> _Shard:
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
            with storage.open_regular(path) as file:
                return _File(url, os.dup(file.fileno()))
        except FileNotFoundError:
            raise DataError(f"{url}: missing") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the shard
                raise StorageError(f"{url}: {error.strerror}; raise the limit (ulimit -n)") from None
            raise DataError(f"{url}: {error.strerror}") from None

    def _close(self, key: tuple[int, bool]) -> None:
        shard = self._shards.pop(key)
        if not shard.cancel():
            shard.add_done_callback(_close_opened)

    def _make_cache(self) -> ShardCache:
        return ShardCache(
            cache_folder(self.data.shard_cache),
            int(self.data.shard_cache_gigabytes * 1e9),
            executor=self._fetchers,
            retry_seconds=self.data.retry_seconds,
            count=self.count,
            on_retry=self.count_retry,
        )


@dataclass(frozen=True)
class _File:
    """A shard in a local file."""

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
    """A shard in object storage, read by range requests."""

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
        whole, start = np.frombuffer(data, dtype=np.uint8), 0
        for buffer in buffers:
            np.copyto(np.frombuffer(buffer, dtype=np.uint8), whole[start : start + len(buffer)])
            start += len(buffer)

    def close(self) -> None:
        """Nothing is open."""


def _is_cached(manifest: Manifest, data: DataConfig) -> bool:
    if data.shard_cache == "auto":
        return bool(manifest.shards) and storage.is_remote(manifest.url(0))
    return data.shard_cache != "none"


def _runs(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group the segments into runs that are read at once: of one shard, in order, with small gaps."""
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
    """Return the buffers of a run, with one for each gap."""
    buffers = list(run[0].buffers)
    for before, segment in itertools.pairwise(run):
        if segment.start > before.stop:
            buffers.append(memoryview(bytearray(segment.start - before.stop)))
        buffers.extend(segment.buffers)
    return buffers


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the remaining buffers after `count` bytes were read."""
    left = []
    for buffer in buffers:
        if count < len(buffer):
            left.append(buffer[count:])
        count = max(0, count - len(buffer))
    return left


def _close_opened(shard: "Future[_Shard]") -> None:
    if not shard.cancelled() and shard.exception() is None:
        shard.result().close()
