"""Files by url, through fsspec: `s3://`, `gs://`, `az://`, `file://`, `memory://` or a plain path.

Writes are atomic: a reader finds the old bytes, the new bytes or nothing, never a part. What a
remote storage refuses for the moment is tried again (`retry.py`); credentials come from the
environment alone.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from avcil_dist.errors import ConfigError, DataError
from avcil_dist.storage.retry import NO_ROOM, ShortReadError, as_fault, missing_bucket, no_room, with_retries

T = TypeVar("T")

CHUNK_BYTES = 8 << 20
READ_SECONDS, WRITE_SECONDS = 60.0, 300.0  # a result of hours waits longer for its storage than a first look does
WITH_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs")
S3_CONFIG = {
    "retries": {"total_max_attempts": 1},  # ours are the ones that are counted
    "connect_timeout": 10,
    "read_timeout": 30,  # of a connection on which nothing comes
    "max_pool_connections": 64,
    "request_checksum_calculation": "when_required",  # servers differ here, some send the whole's for a range;
    "response_checksum_validation": "when_required",  # what must be right is held against the manifest's sha256
}


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `url` and the path in it; one filesystem a process, made anew after a fork.

    `pipe:` is refused: it would run a shell. Raises ConfigError for it, and for unknown protocols.
    """
    if url.startswith("pipe:"):
        raise ConfigError(
            f"{url}: pipe urls run shell commands and are refused; give an fsspec url (s3://, file://, ...)"
        )
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
        filesystem.retries = 1  # gcsfs and s3fs: see S3_CONFIG
        return filesystem, path
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{url}: {error}") from None


def join(root: str, *parts: str) -> str:
    """`root/part/part`; an absolute last part or a full url stands for itself."""
    joined = root
    for part in parts:
        stands_alone = "://" in part or part.startswith(("/", "pipe:"))  # a pipe, so that it is refused by name
        joined = part if stands_alone else f"{joined.rstrip('/')}/{part}"
    return joined


def parent(url: str) -> str:
    """The folder that `url` is in; `.` for a bare file name."""
    return url.rsplit("/", 1)[0] if "/" in url else "."


def local_path(url: str) -> str | None:
    """The path of a file that the operating system reads itself; None for any other."""
    filesystem, path = open_filesystem(url)
    return path if isinstance(filesystem, LocalFileSystem) else None


def is_remote(url: str) -> bool:
    """Whether reads of `url` go over a network and may fail for the moment."""
    return not isinstance(open_filesystem(url)[0], (LocalFileSystem, MemoryFileSystem))


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`, asked afresh each time."""
    filesystem, path = open_filesystem(url)

    def ask() -> bool:
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))

    return _trying(ask, url, READ_SECONDS)


def size(url: str) -> int:
    """Bytes of the file at `url`, asked afresh each time. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)

    def ask() -> int:
        filesystem.invalidate_cache()
        return int(filesystem.size(path))

    return _trying(ask, url, READ_SECONDS)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)
    return _trying(lambda: bytes(filesystem.cat_file(path)), url, READ_SECONDS)


def read_range(
    url: str, start: int, stop: int, *, seconds: float = READ_SECONDS, on_retry: Callable[[], None] | None = None
) -> bytes:
    """Bytes `start` … `stop - 1`. Raises DataError for a file that is missing or ends before `stop`."""
    filesystem, path = open_filesystem(url)

    def read() -> bytes:
        try:
            data = bytes(filesystem.cat_file(path, start=start, end=stop))
        except (OSError, ValueError) as error:  # a server's way to say that the range begins beyond the end
            if isinstance(error, ValueError) or error.errno == errno.EINVAL:
                _check_reaches(url, stop)
            raise
        if len(data) != stop - start:
            _check_reaches(url, stop)
            raise ShortReadError(f"{len(data)} of {stop - start} bytes came")
        return data

    return _trying(read, url, seconds, on_retry)


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file at once; folders are made as needed."""
    filesystem, path = open_filesystem(url)
    if not isinstance(filesystem, LocalFileSystem):
        # one request, or parts that are put together at the end: object stores show whole objects only
        _trying(lambda: filesystem.pipe_file(path, data), url, WRITE_SECONDS)
        return
    with _replacing(Path(path)) as file:
        file.write(data)


def upload(source: str | Path, url: str) -> None:
    """Copy a local file to `url`, as atomic as `write_bytes`; a large one goes in parts and is never all in memory.

    Raises DataError where there is no such file.
    """
    filesystem, path = open_filesystem(url)
    if not Path(source).is_file():
        raise DataError(f"{source}: missing")
    if not isinstance(filesystem, LocalFileSystem):
        _trying(lambda: filesystem.put_file(str(source), path), url, WRITE_SECONDS)
        return
    with Path(source).open("rb") as opened, _replacing(Path(path)) as file:
        shutil.copyfileobj(opened, file, CHUNK_BYTES)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` as the block ends well, and is gone otherwise."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(str(path), error) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_file(url: str) -> Iterator[BinaryIO]:
    """A local file to write, for what is too large for memory; it appears at `url`, whole, when the block ends well."""
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        with _replacing(Path(path)) as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "file"
        with copy.open("wb") as file:
            yield file
        upload(copy, url)


def remove_tree(url: str) -> None:
    """Remove a folder and all in it; nothing happens where there is none."""
    filesystem, path = open_filesystem(url)

    def remove() -> None:
        filesystem.invalidate_cache()
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    _trying(remove, url, WRITE_SECONDS)


def list_folder(url: str) -> list[str]:
    """The names in a folder, sorted, asked afresh each time; none where there is no folder."""
    filesystem, path = open_filesystem(url)

    def ask() -> list[str]:
        filesystem.invalidate_cache()
        found = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    return _trying(ask, url, READ_SECONDS)


@contextmanager
def local_copy(url: str) -> Iterator[str]:
    """A folder as a local path: the folder itself where it is local, else a copy for the length of the block."""
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        _trying(lambda: filesystem.get(path.rstrip("/") + "/", folder + "/", recursive=True), url, READ_SECONDS)
        yield folder


def read_json(url: str) -> Any:
    """The parsed JSON file. Raises DataError where it is missing or no JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise DataError(f"{url}: not valid JSON ({error})") from None


def write_json(url: str, value: Any) -> None:
    """Write `value` as JSON with sorted keys: equal values give equal bytes."""
    write_bytes(url, json.dumps(value, sort_keys=True, indent=1).encode())


def sha256(data: bytes) -> str:
    """The hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(url: str) -> str:
    """The hex digest of the file at `url`, read in chunks. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)

    def read() -> str:
        digest = hashlib.sha256()
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return _trying(read, url, READ_SECONDS)


def _options(url: str) -> dict[str, Any]:
    """How a filesystem is made. Listings are never kept: a manifest is the list, and what others write is seen."""
    protocol = fsspec.core.split_protocol(url)[0]
    if protocol not in ("s3", "s3a"):
        return {}
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})  # from FSSPEC_S3_CONFIG_KWARGS
    return {"config_kwargs": S3_CONFIG | configured, "use_listings_cache": False}


def _trying(call: Callable[[], T], url: str, seconds: float, on_retry: Callable[[], None] | None = None) -> T:
    """`call()` with retries where the storage is remote; what a user can do wrong leaves as a typed error."""
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
            raise missing_bucket(url) from None  # a server tells it only to those who ask for the bucket
        raise


def _check_reaches(url: str, stop: int) -> None:
    """Raises DataError when the file at `url` ends before `stop`."""
    found = size(url)
    if found < stop:
        raise DataError(f"{url}: {found} bytes, {stop} are needed; the shard is cut")
