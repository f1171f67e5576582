"""Local files: only regular files are read, and a write replaces a regular file as a whole, or nothing."""

import errno
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from avcil_dist.errors import DataError, StorageError
from avcil_dist.storage.retry import NO_ROOM, cannot_write

PREFIX = "avcil-"  # of temporary folders
_place: str | None = None  # of temporary folders; None: TMPDIR
REFUSED = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.ENOTDIR)  # of a disk or folder that takes no file


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises DataError for a pipe, a device or a socket, OSError as `open` does.

    Such a file is never waited for: the first byte of a pipe, or the end of a device, may never come.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(str(path), os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str, status: os.stat_result) -> os.stat_result:
    """Return `status`, if it is that of a regular file. Raises IsADirectoryError or DataError otherwise."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file, but a device, a pipe or a socket; name a file")
    return status


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the block, and is removed if the block raises.

    Folders are made as needed. Raises StorageError where the file cannot be written, or is there and no regular file.
    """
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}")
    with writing(path):
        with suppress(FileNotFoundError):
            _check_replaceable(path, path.stat())
        temporary.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    try:
        with writing(path, NO_ROOM), file:  # other faults of the block are those of its own files
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):  # the error of the write is the one that counts
            temporary.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[BaseFileLock]:
    """Hold the lock of a lock file during the block; its folder is made as needed.

    Raises Timeout when another process holds it for longer than `seconds`, StorageError where it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=seconds)
    try:
        yield lock
    finally:
        lock.release()


def place_temporary_folders(below: str) -> None:
    """Let `temporary_folder` make its folders below another one than TMPDIR, in this process, from now on.

    The caches of the user below TMPDIR stay there.
    """
    global _place
    _place = below


@contextmanager
def temporary_folder(below: str | None = None) -> Iterator[Path]:
    """Make a folder below TMPDIR, or another folder, for the length of the block.

    Raises StorageError where that has no room, or is none.
    """
    with _making_temporary(below):
        folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=below or _place)
    with folder as path:
        try:
            yield Path(path)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise no_room_for_temporary(path, error) from None


def new_temporary_folder() -> Path:
    """Make a folder below TMPDIR that stays. Raises StorageError where that has no room, or is none."""
    with _making_temporary(None):
        return Path(tempfile.mkdtemp(prefix=PREFIX))


@contextmanager
def _making_temporary(below: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = "TMPDIR" if below is None else below
        raise StorageError(f"{place}: no temporary folder can be made ({error.strerror}); name another one") from None


def no_room_for_temporary(path: str | Path, error: OSError) -> StorageError:
    """Return the error of a temporary file that cannot be written."""
    return StorageError(f"{path}: cannot be written ({error.strerror}); make room, or set TMPDIR to another folder")


@contextmanager
def writing(path: Path, numbers: tuple[int, ...] | None = None) -> Iterator[None]:
    """Raise StorageError for an OSError of the block, which writes `path`, if its number is one of `numbers`.

    Without `numbers` any OSError is one of the path; a block that does more than to write it has `REFUSED`.
    """
    try:
        yield
    except Timeout:  # of a lock; it is an OSError too
        raise
    except OSError as error:
        if numbers is not None and error.errno not in numbers:
            raise
        raise cannot_write(str(path), error) from None


def _check_replaceable(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{path}: cannot be written, it is a folder; give the name of a file")
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{path}: cannot be written, it is a device, a pipe or a socket; give the name of a file")
