"""Files by url, through fsspec: `s3://`, `gs://`, `file://`, `memory://` or a plain path.

Writes are atomic: a reader finds the old bytes, the new bytes or nothing, never a part.
"""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from avcil_dist.errors import ConfigError, DataError

CHUNK_BYTES = 8 << 20


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `url` and the path in it. `pipe:` is refused: it would run a shell."""
    if url.startswith("pipe:"):
        raise ConfigError(
            f"{url}: pipe urls run shell commands and are refused; give an fsspec url (s3://, file://, ...)"
        )
    try:
        return fsspec.core.url_to_fs(url)
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


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`, asked afresh each time."""
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache()
    return bool(filesystem.exists(path))


def size(url: str) -> int:
    """Bytes of the file at `url`. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)
    with _read_faults(url):
        return int(filesystem.size(path))


def read_bytes(url: str) -> bytes:
    """The whole file. Raises DataError where there is none."""
    filesystem, path = open_filesystem(url)
    with _read_faults(url):
        return bytes(filesystem.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write the whole file at once; folders are made as needed."""
    filesystem, path = open_filesystem(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, data)  # one request: object stores show whole objects only
        return
    temporary = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_file(url: str) -> Iterator[IO[bytes]]:
    """A local file to write, for what is too large for memory; it appears at `url`, whole, when the block ends well.

    Object stores get it as one upload (in parts where it is large), which they show only when it is complete.
    """
    filesystem, path = open_filesystem(url)
    is_local = isinstance(filesystem, LocalFileSystem)
    folder = Path(path).parent if is_local else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{Path(path).name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if is_local:
            temporary.replace(path)
        else:
            filesystem.put_file(str(temporary), path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_tree(url: str) -> None:
    """Remove a folder and all in it; nothing happens where there is none."""
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@contextmanager
def local_copy(url: str) -> Iterator[str]:
    """A folder as a local path: the folder itself where it is local, else a copy for the length of the block."""
    filesystem, path = open_filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        filesystem.get(path.rstrip("/") + "/", folder + "/", recursive=True)
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
    digest = hashlib.sha256()
    with _read_faults(url), filesystem.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _read_faults(url: str) -> Iterator[None]:
    """What a wrong url makes of a read, as DataError."""
    try:
        yield
    except IsADirectoryError:
        raise DataError(f"{url}: a folder, not a file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{url}: missing") from None
