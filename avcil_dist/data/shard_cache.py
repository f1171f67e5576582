"""Cache of whole shards on the local disk, bounded in size and shared by all processes of a node.

A shard is fetched once per node: under a lock, into a file with a temporary name, verified by size and sha256, then
renamed. Files are named by digest, so runs and manifests share them, and a stale file is never used. A shard in use
is protected by a lock on its file, which the system releases when its process ends; of the others, the least recently
used are removed to make room.

Where there is no room (a full disk, or a cache smaller than the shards in use), `open` returns None and the shard is
read by range requests instead: slower, with the same bytes.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError

CHUNK_BYTES = 16 << 20
CHUNKS_AT_A_TIME = 8
DISK_RESERVE = 0.05  # fraction of the disk that stays free for others
_logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return the default folder of the cache: below TMPDIR, one folder per user."""
    return Path(tempfile.gettempdir()) / f"avcil-shards-{os.getuid()}"


class ShardCache:
    """Whole shards in `folder`, at most `max_bytes`. Safe for any number of threads and processes.

    `executor` fetches the chunks of a shard. `count` is called with "cache_hits", "cache_misses", "cache_full" and
    "fetched_bytes" and an amount; `on_retry` is called before each retry. Raises ConfigError for a folder that
    cannot be written or belongs to another user.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        executor: Executor,
        retry_seconds: float,
        count: Callable[[str, int], None],
        on_retry: Callable[[], None],
    ) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._executor, self._retry_seconds = executor, retry_seconds
        self._count, self._on_retry = count, on_retry
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / "locks").mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.shard_cache: {folder}: {error.strerror}; name a folder that can be written"
            ) from None
        if folder.stat().st_uid != os.getuid():
            raise ConfigError(f"data.shard_cache: {folder}: belongs to another user; name a folder of your own")

    def find(self, size: int, sha256: str) -> int | None:
        """Return a descriptor of the shard as `open` does, or None if it is not cached; nothing is fetched."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self._path(sha256), os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink and status.st_size == size:  # no link: it was removed between the two calls
                os.utime(descriptor)
                return descriptor
            os.close(descriptor)
        return None

    def open(self, url: str, size: int, sha256: str) -> int | None:
        """Return a descriptor of the whole shard, which stays in the cache until the descriptor is closed.

        Returns None where there is no room for it. Raises DataError for a shard that is missing or differs from the
        manifest, StorageError when the storage fails for longer than the time limit.
        """
        with FileLock(self.folder / "locks" / f"{sha256[:2]}.lock"):
            descriptor = self.find(size, sha256)
            if descriptor is not None:
                self._count("cache_hits", 1)
                return descriptor
            temporary = self._reserve(url, size, sha256)
            if temporary is None:
                self._count("cache_full", 1)
                return None
            path, descriptor = temporary
            try:
                self._fetch(url, descriptor, size, sha256)
                with self._room():  # a process that sums up sizes must not miss the file between its two names
                    path.rename(self._path(sha256))
            except BaseException:
                path.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._count("cache_misses", 1)
            return descriptor

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _room(self) -> FileLock:
        """Return the lock for adding, removing and counting files."""
        return FileLock(self.folder / "locks" / "room.lock")

    def _reserve(self, url: str, size: int, sha256: str) -> tuple[Path, int] | None:
        """Return a temporary file with its full size allocated, locked; None where there is no room."""
        with self._room():
            if not self._make_room(size):
                _logger.warning("%s: no room in the cache %s; reading it by range requests", url, self.folder)
                return None
            path = self.folder / f".{sha256}.{uuid.uuid4().hex}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                path.unlink()
                os.close(descriptor)
                _logger.warning("%s: %s: %s; reading it by range requests", url, self.folder, error.strerror)
                return None
            return path, descriptor

    def _make_room(self, size: int) -> bool:
        """Remove unused files, the least recently used first, until `size` more bytes fit. Returns whether they fit."""
        files: list[tuple[bool, int, Path, int]] = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.is_file():
                    status = entry.stat()
                    # files with temporary names, left behind by killed processes, are removed first
                    files.append((not entry.name.startswith("."), status.st_mtime_ns, Path(entry), status.st_size))
        disk = shutil.disk_usage(self.folder)
        excess = max(
            sum(entry[-1] for entry in files) + size - self.max_bytes, size + int(DISK_RESERVE * disk.total) - disk.free
        )
        for is_whole, _, path, length in sorted(files):
            if excess <= 0 and is_whole:
                break
            if _remove_unused(path):
                excess -= length
        return excess <= 0

    def _fetch(self, url: str, descriptor: int, size: int, sha256: str) -> None:
        """Fetch the shard into the file, several chunks at a time, and verify its digest."""
        digest = hashlib.sha256()
        for start, data in self._chunks(url, size):
            digest.update(data)
            os.pwrite(descriptor, data, start)
            self._count("fetched_bytes", len(data))
        if digest.hexdigest() != sha256:
            raise DataError(f"{url}: its sha256 is not the manifest's; restore the shard, or build it again")

    def _chunks(self, url: str, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield offset and bytes of each chunk, in order."""
        waiting: deque[tuple[int, Future[bytes]]] = deque()
        try:
            for start in range(0, size, CHUNK_BYTES):
                waiting.append((start, self._executor.submit(self._chunk, url, start, min(start + CHUNK_BYTES, size))))
                if len(waiting) == CHUNKS_AT_A_TIME:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _chunk(self, url: str, start: int, stop: int) -> bytes:
        return storage.read_range(url, start, stop, seconds=self._retry_seconds, on_retry=self._on_retry)


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process uses it. Returns whether it was removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
