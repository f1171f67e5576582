"""Cache of whole shards on the local disk, bounded in size and shared by all processes of a node.

A shard is fetched once per node: under a lock, into a file with a temporary name, verified by size and sha256, then
renamed. Files are named by digest, so runs and manifests share them, and a stale file is never used. A shard in use
is protected by a lock on its file, which the system releases when its process ends; of the others, the least recently
used are removed to make room.

The cache has a folder of its own, with a marker, that no other user can write. It removes only files that have names of
its own there.

Where there is no room (a full disk, or a cache smaller than the shards in use), `open` returns None and the shard is
read by range requests instead: slower, with the same bytes.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError, StorageError
from avcil_dist.system.trusted_files import make_private_folder

CHUNK_BYTES = 16 << 20
CHUNKS_AT_A_TIME = 8
DISK_RESERVE = 0.05  # fraction of the disk that stays free for others
OWN_FOLDER, MARKER, LOCKS = "avcil-shards", ".avcil-shard-cache", "locks"
DIGEST = re.compile(r"[0-9a-f]{64}")
WHOLE = re.compile(r"[0-9a-f]{64}\.tar")
TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{32}")
_logger = logging.getLogger(__name__)


def cache_folder(setting: str) -> Path:
    """Return the cache's own folder: below that of the setting, or one per user below TMPDIR for `auto`.

    Raises ConfigError for a folder that is not on a local disk.
    """
    if setting == "auto":
        return Path(tempfile.gettempdir()) / f"{OWN_FOLDER}-{os.getuid()}"
    path = storage.local_path(setting)
    if path is None:
        raise ConfigError(f"data.shard_cache: {setting}: not on a local disk; name a folder that is")
    return Path(path) / OWN_FOLDER


class ShardCache:
    """Whole shards in `folder`, the cache's own, at most `max_bytes`. Safe for any number of threads and processes.

    `executor` fetches the chunks of a shard. `count` is called with "cache_hits", "cache_misses", "cache_full" and
    "fetched_bytes" and an amount; `on_retry` is called before each retry. Raises ConfigError for a folder that
    cannot be written, can be written by other users, or holds other files.
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
            _make_own_folder(folder)
        except ConfigError as error:
            raise ConfigError(f"data.shard_cache: {error}") from None
        except OSError as error:
            raise ConfigError(
                f"data.shard_cache: {folder}: {error.strerror}; name a folder that can be written"
            ) from None

    def find(self, size: int, sha256: str) -> int | None:
        """Return a descriptor of the shard as `open` does, or None if it is not cached; nothing is fetched.

        Raises StorageError as `open` does.
        """
        with self._typed():
            return self._find(size, sha256)

    def _find(self, size: int, sha256: str) -> int | None:
        descriptor = _open_own(self._path(sha256))
        if descriptor is None:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if status.st_nlink and status.st_size == size:  # no link: it was removed between the two calls
            with suppress(OSError):  # a disk that can only be read keeps the old time
                os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        return None

    def open(self, url: str, size: int, sha256: str) -> int | None:
        """Return a descriptor of the whole shard, which stays in the cache until the descriptor is closed.

        Returns None where there is no room for it. Raises DataError for a shard that is missing or differs from the
        manifest, StorageError when the storage fails for longer than the time limit.
        """
        self._path(sha256)
        with self._typed():
            if not (self.folder / MARKER).exists():  # TMPDIR may be cleaned meanwhile
                _make_own_folder(self.folder)
            return self._open(url, size, sha256)

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """Raise StorageError for the faults of the cache's disk in the block."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"data.shard_cache: {self.folder}: {error.strerror}; check the disk, or name another folder"
            ) from None

    def _open(self, url: str, size: int, sha256: str) -> int | None:
        with FileLock(self.folder / LOCKS / f"{sha256[:2]}.lock"):
            descriptor = self._find(size, sha256)
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
                os.close(descriptor)
                with suppress(OSError):  # the error of the write is the one that counts
                    path.unlink(missing_ok=True)
                raise
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._count("cache_misses", 1)
            return descriptor

    def _path(self, sha256: str) -> Path:
        if not DIGEST.fullmatch(sha256):
            raise DataError(f"sha256 {sha256[:100]!r}: not 64 hex digits; the manifest is damaged, build it again")
        return self.folder / f"{sha256}.tar"

    def _room(self) -> FileLock:
        """Return the lock for adding, removing and counting files."""
        return FileLock(self.folder / LOCKS / "room.lock")

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
        """Remove unused files, the least recently used first, until `size` more bytes fit. Returns whether they fit.

        No shard is removed where the unused ones do not suffice.
        """
        files: list[tuple[bool, int, Path, int]] = []
        for entry in os.scandir(self.folder):
            is_whole = bool(WHOLE.fullmatch(entry.name))
            if not (is_whole or TEMPORARY.fullmatch(entry.name)):
                continue
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    files.append((is_whole, status.st_mtime_ns, Path(entry), status.st_size))
        disk = shutil.disk_usage(self.folder)
        excess = max(
            sum(entry[-1] for entry in files) + size - self.max_bytes, size + int(DISK_RESERVE * disk.total) - disk.free
        )
        for is_whole, _, path, length in files:  # those with temporary names are left behind by killed processes
            if not is_whole and _remove_unused(path):
                excess -= length
        shards = [(path, length) for is_whole, _, path, length in sorted(files) if is_whole]
        if excess > 0 and excess > sum(length for path, length in shards if _is_unused(path)):
            return False
        for path, length in shards:
            if excess <= 0:
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


def _make_own_folder(folder: Path) -> None:
    """Make the cache's folder, with its marker. Raises ConfigError for one with other files, and OSError."""
    make_private_folder(folder)
    marker = folder / MARKER
    foreign = [path.name for path in folder.iterdir() if not _is_own(path.name)]
    if foreign and not marker.exists():
        raise ConfigError(f"{folder}: holds {foreign[0]!r}, so it is no folder of the shard cache; name another")
    marker.touch()
    (folder / LOCKS).mkdir(exist_ok=True)


def _is_own(name: str) -> bool:
    return name in (MARKER, LOCKS) or bool(WHOLE.fullmatch(name) or TEMPORARY.fullmatch(name))


def _open_own(path: Path) -> int | None:
    """Return a descriptor of a regular file; None where there is none, such as for a link or a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process uses it. Returns whether it was removed."""
    with _lock_unused(path) as is_unused:
        if is_unused:
            path.unlink(missing_ok=True)
    return is_unused


def _is_unused(path: Path) -> bool:
    with _lock_unused(path) as is_unused:
        return is_unused


@contextmanager
def _lock_unused(path: Path) -> Iterator[bool]:
    """Lock a file during the block unless a process uses it. Yields whether it is locked."""
    descriptor = _open_own(path)
    if descriptor is None:
        yield False
        return
    try:
        is_unused = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_unused = False
        yield is_unused
    finally:
        os.close(descriptor)
