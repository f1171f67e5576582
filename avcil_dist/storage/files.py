"""Files by url: a plain path, or one of the protocols of `urls.py`, through fsspec.

Writes are atomic: a reader finds the old bytes, the new bytes or nothing, never a part of them. Local files are regular
ones (`local.py`). Transient failures of remote storage are retried (`retry.py`). Credentials come from the environment
only.
"""

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from avcil_dist.errors import ConfigError, DataError
from avcil_dist.storage.local import check_regular, open_regular, replacing, temporary_folder
from avcil_dist.storage.retry import ShortReadError, as_fault, missing_bucket, with_retries
from avcil_dist.storage.urls import LOCAL, WITH_BUCKETS, is_inner, split_url

T = TypeVar("T")

CHUNK_BYTES = 8 << 20
VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")  # in `info`
READ_SECONDS, WRITE_SECONDS = 60.0, 300.0  # time limits of retries; results of long work are worth a longer wait
S3_CONFIG = {
    "retries": {"total_max_attempts": 1},  # no retries here: `retry.py` does and counts them
    "connect_timeout": 10,
    "read_timeout": 30,  # time limit of a silent connection
    "max_pool_connections": 64,
    # servers differ: some send the checksum of the whole file for a range; the manifest's sha256 verifies shards
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
S3_PARTS = {"chunksize": CHUNK_BYTES, "max_concurrency": 4}  # of an upload; those of a moment are in memory, twice


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of `url` and the path in it. A filesystem is made once per process, and again after a fork.

    Raises ConfigError for a url that `check_url` refuses, and where the client of its protocol is not installed.
    """
    protocol, path = split_url(url)
    if protocol == LOCAL:
        return fsspec.filesystem(LOCAL), path
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(protocol))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{url}: {error}") from None
    filesystem.retries = 1  # of gcsfs and s3fs: see S3_CONFIG
    return filesystem, path


def local_path(url: str) -> str | None:
    """Return the path of a local file; None for a url of any other filesystem."""
    filesystem, path = open_filesystem(url)
    return path if isinstance(filesystem, LocalFileSystem) else None


def is_remote(url: str) -> bool:
    """Whether reads of `url` go over a network and may fail transiently."""
    return not isinstance(open_filesystem(url)[0], (LocalFileSystem, MemoryFileSystem))


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`; the answer is never cached."""
    filesystem, path = open_filesystem(url)

    def look_up() -> bool:
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))

    return _call(look_up, url, READ_SECONDS)


def size(url: str) -> int:
    """Return the size of the file at `url` in bytes, never cached. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)

    def look_up() -> int:
        if isinstance(filesystem, LocalFileSystem):
            return check_regular(path, Path(path).stat()).st_size
        filesystem.invalidate_cache()
        return int(filesystem.size(path))

    return _call(look_up, url, READ_SECONDS)


def version(url: str) -> str:
    """Return a text that changes with the file at `url`, never cached. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)

    def look_up() -> str:
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        return f"{info['size']} {next((info[name] for name in VERSIONS if info.get(name)), '')}"

    return _call(look_up, url, READ_SECONDS)


def find(pattern: str) -> list[str]:
    """Return the sorted urls of the files that match a url with `*`, `?` or `[…]`, never cached."""
    filesystem, path = open_filesystem(pattern)

    def look_up() -> list[str]:
        filesystem.invalidate_cache()
        found = sorted(name for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file")
        protocol = split_url(pattern)[0]
        return found if protocol == LOCAL else [f"{protocol}://{name.lstrip('/')}" for name in found]

    return _call(look_up, pattern, READ_SECONDS)


def read_bytes(url: str, *, max_bytes: int | None = None) -> bytes:
    """Return the whole file. Raises DataError where there is none, or it has more than `max_bytes`."""
    filesystem, path = open_filesystem(url)
    if max_bytes is not None and size(url) > max_bytes:
        raise DataError(f"{url}: larger than {max_bytes} bytes; it is not what belongs here")
    return _call(lambda: _content(filesystem, path), url, READ_SECONDS)


@contextmanager
def open_file(url: str, block_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading, in blocks where it is remote. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)

    def open_it() -> BinaryIO:
        if isinstance(filesystem, LocalFileSystem):
            return open_regular(path)
        return filesystem.open(path, "rb", block_size=block_bytes)

    with _call(open_it, url, READ_SECONDS) as file:
        yield file


def read_range(
    url: str, start: int, stop: int, *, seconds: float = READ_SECONDS, on_retry: Callable[[], None] | None = None
) -> bytes:
    """Return bytes `start` … `stop - 1`. Raises DataError for a file that is missing or ends before `stop`."""
    filesystem, path = open_filesystem(url)

    def read() -> bytes:
        try:
            data = _content(filesystem, path, start, stop)
        except (OSError, ValueError) as error:  # raised by some filesystems for a range beyond the end
            if isinstance(error, ValueError) or error.errno == errno.EINVAL:
                _check_reaches(url, stop)
            raise
        if len(data) != stop - start:
            _check_reaches(url, stop)
            raise ShortReadError(f"{len(data)} of {stop - start} bytes received")
        return data

    return _call(read, url, seconds, on_retry)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file atomically; folders are made as needed."""
    filesystem, path = open_filesystem(url)
    if not isinstance(filesystem, LocalFileSystem):
        # one request, or a multipart upload: object stores show complete objects only
        _call(lambda: filesystem.pipe_file(path, data), url, WRITE_SECONDS)
        return
    with replacing(Path(path)) as file:
        file.write(data)


def upload(source: str | Path, url: str) -> None:
    """Copy a local file to `url`, as atomically as `write_bytes`, in parts of bounded memory.

    Raises DataError where there is no such file.
    """
    filesystem, path = open_filesystem(url)
    if not Path(source).is_file():
        raise DataError(f"{source}: missing")
    if not isinstance(filesystem, LocalFileSystem):
        parts = S3_PARTS if split_url(url)[0] == "s3" else {}
        _call(lambda: filesystem.put_file(str(source), path, **parts), url, WRITE_SECONDS)
        return
    with open_regular(source) as opened, replacing(Path(path)) as file:
        shutil.copyfileobj(opened, file, CHUNK_BYTES)


@contextmanager
def new_file(url: str) -> Iterator[BinaryIO]:
    """Open a local file that is written to `url` at the end of the block, for files larger than memory."""
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        with replacing(Path(path)) as file:
            yield file
        return
    with temporary_folder() as folder:
        copy = folder / "file"
        with copy.open("wb") as file:
            yield file
        upload(copy, url)


def remove_tree(url: str) -> None:
    """Remove a folder and its content, if it exists."""
    filesystem, path = open_filesystem(url)

    def remove() -> None:
        filesystem.invalidate_cache()
        if not filesystem.exists(path):
            return
        if isinstance(filesystem, LocalFileSystem) and Path(path).is_dir():
            shutil.rmtree(path)  # fsspec refuses the working folder by an error that is no OSError
        else:
            filesystem.rm(path, recursive=True)

    _call(remove, url, WRITE_SECONDS)


def list_folder(url: str) -> list[str]:
    """Return the sorted names in a folder, never cached; an empty list where there is no folder.

    Names that `join` refuses, such as one with a line break, are left out.
    """
    filesystem, path = open_filesystem(url)

    def look_up() -> list[str]:
        filesystem.invalidate_cache()
        paths = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
        names = (name.rstrip("/").rsplit("/", 1)[-1] for name in paths)
        return sorted(name for name in names if is_inner(name))

    return _call(look_up, url, READ_SECONDS)


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Yield a file as a local path: itself where it is local, otherwise a copy of this name for the block's length.

    Raises DataError where there is none.
    """
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        size(url)
        yield Path(path)
        return
    with temporary_folder() as folder:
        copy = folder / PurePosixPath(path).name
        _call(lambda: filesystem.get_file(path, str(copy)), url, READ_SECONDS)
        yield copy


def sha256(data: bytes) -> str:
    """Return the hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(url: str) -> str:
    """Return the hex digest of the file at `url`, read in chunks. Raises DataError where there is none."""

    def read() -> str:
        digest = hashlib.sha256()
        with open_file(url) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return _call(read, url, READ_SECONDS)


def _content(
    filesystem: fsspec.AbstractFileSystem, path: str, start: int | None = None, stop: int | None = None
) -> bytes:
    if not isinstance(filesystem, LocalFileSystem):
        return bytes(filesystem.cat_file(path, start=start, end=stop))
    with open_regular(path) as file:
        file.seek(start or 0)
        return file.read() if stop is None else file.read(max(0, stop - (start or 0)))


def _options(protocol: str) -> dict[str, Any]:
    """Return the options of a filesystem. Listings are never cached, so that files of other writers are visible."""
    if protocol != "s3":
        return {}
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})  # from FSSPEC_S3_CONFIG_KWARGS
    return {"config_kwargs": S3_CONFIG | configured, "use_listings_cache": False}


def _call(call: Callable[[], T], url: str, seconds: float, on_retry: Callable[[], None] | None = None) -> T:
    """Return `call()`, with retries where the storage is remote. Faults outside the program are typed errors."""
    filesystem, path = open_filesystem(url)
    if not is_remote(url):
        try:
            return call()
        except OSError as error:
            fault = as_fault(url, error)
            if fault is None:
                raise
            raise fault from None
    try:
        return with_retries(call, url, seconds=seconds, on_retry=on_retry)
    except DataError:
        if url.split("://")[0] in WITH_BUCKETS and not filesystem.exists(path.split("/")[0]):
            raise missing_bucket(url) from None  # servers report it only for requests of the bucket itself
        raise


def _check_reaches(url: str, stop: int) -> None:
    """Check the size of the file at `url`. Raises DataError when it ends before `stop`."""
    length = size(url)
    if length < stop:
        raise DataError(f"{url}: {length} bytes, {stop} are needed; the shard is cut")
