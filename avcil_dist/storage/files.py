"""Files by url, through fsspec: `s3://`, `gs://`, `az://`, `file://`, `memory://` or a plain path.

Writes are atomic: a reader finds the old bytes, the new bytes or nothing, never a part of them. Transient failures of
remote storage are retried (`retry.py`). Credentials come from the environment only.
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
READ_SECONDS, WRITE_SECONDS = 60.0, 300.0  # time limits of retries; results of long work are worth a longer wait
WITH_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs")
S3_CONFIG = {
    "retries": {"total_max_attempts": 1},  # no retries here: `retry.py` does and counts them
    "connect_timeout": 10,
    "read_timeout": 30,  # time limit of a silent connection
    "max_pool_connections": 64,
    # servers differ: some send the checksum of the whole file for a range; the manifest's sha256 verifies shards
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of `url` and the path in it. A filesystem is made once per process, and again after a fork.

    Raises ConfigError for unknown protocols, and for `pipe:`, which would run a shell.
    """
    if url.startswith("pipe:"):
        raise ConfigError(
            f"{url}: pipe urls run shell commands and are refused; give an fsspec url (s3://, file://, ...)"
        )
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
        filesystem.retries = 1  # of gcsfs and s3fs: see S3_CONFIG
        return filesystem, path
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{url}: {error}") from None


def join(root: str, *parts: str) -> str:
    """Return `root/part/part`; a part that is an absolute path or a full url replaces what precedes it."""
    joined = root
    for part in parts:
        is_complete = "://" in part or part.startswith(("/", "pipe:"))  # kept for `open_filesystem` to refuse
        joined = part if is_complete else f"{joined.rstrip('/')}/{part}"
    return joined


def parent(url: str) -> str:
    """Return the folder of `url`; `.` for a bare file name."""
    return url.rsplit("/", 1)[0] if "/" in url else "."


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
        filesystem.invalidate_cache()
        return int(filesystem.size(path))

    return _call(look_up, url, READ_SECONDS)


def read_bytes(url: str) -> bytes:
    """Return the whole file. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)
    return _call(lambda: bytes(filesystem.cat_file(path)), url, READ_SECONDS)


def read_range(
    url: str, start: int, stop: int, *, seconds: float = READ_SECONDS, on_retry: Callable[[], None] | None = None
) -> bytes:
    """Return bytes `start` … `stop - 1`. Raises DataError for a file that is missing or ends before `stop`."""
    filesystem, path = open_filesystem(url)

    def read() -> bytes:
        try:
            data = bytes(filesystem.cat_file(path, start=start, end=stop))
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
    with _replacing(Path(path)) as file:
        file.write(data)


def upload(source: str | Path, url: str) -> None:
    """Copy a local file to `url`, as atomically as `write_bytes`, in parts of bounded memory.

    Raises DataError where there is no such file.
    """
    filesystem, path = open_filesystem(url)
    if not Path(source).is_file():
        raise DataError(f"{source}: missing")
    if not isinstance(filesystem, LocalFileSystem):
        _call(lambda: filesystem.put_file(str(source), path), url, WRITE_SECONDS)
        return
    with Path(source).open("rb") as opened, _replacing(Path(path)) as file:
        shutil.copyfileobj(opened, file, CHUNK_BYTES)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the block, and is removed if the block raises."""
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
    """Open a local file that is written to `url` at the end of the block, for files larger than memory."""
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
    """Remove a folder and its content, if it exists."""
    filesystem, path = open_filesystem(url)

    def remove() -> None:
        filesystem.invalidate_cache()
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    _call(remove, url, WRITE_SECONDS)


def list_folder(url: str) -> list[str]:
    """Return the sorted names in a folder, never cached; an empty list where there is no folder."""
    filesystem, path = open_filesystem(url)

    def look_up() -> list[str]:
        filesystem.invalidate_cache()
        paths = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in paths)

    return _call(look_up, url, READ_SECONDS)


@contextmanager
def local_copy(url: str) -> Iterator[str]:
    """Yield a folder as a local path: itself where it is local, otherwise a copy for the length of the block."""
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        _call(lambda: filesystem.get(path.rstrip("/") + "/", folder + "/", recursive=True), url, READ_SECONDS)
        yield folder


def read_json(url: str) -> Any:
    """Return the parsed JSON file. Raises DataError where it is missing or not JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise DataError(f"{url}: not valid JSON ({error})") from None


def write_json(url: str, value: Any) -> None:
    """Write `value` as JSON with sorted keys: equal values give equal bytes."""
    write_bytes(url, json.dumps(value, sort_keys=True, indent=1).encode())


def sha256(data: bytes) -> str:
    """Return the hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(url: str) -> str:
    """Return the hex digest of the file at `url`, read in chunks. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)

    def read() -> str:
        digest = hashlib.sha256()
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    return _call(read, url, READ_SECONDS)


def _options(url: str) -> dict[str, Any]:
    """Return the options of a filesystem. Listings are never cached, so that files of other writers are visible."""
    protocol = fsspec.core.split_protocol(url)[0]
    if protocol not in ("s3", "s3a"):
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
