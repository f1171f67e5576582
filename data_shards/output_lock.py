"""Lock of an output folder: two builds into one folder would remove each other's files."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from avcil_dist import storage
from avcil_dist.errors import StorageError

LOCK, MANIFEST = ".build.lock", "manifest.json"

_logger = logging.getLogger(__name__)


@contextmanager
def sole_build(output: str) -> Iterator[None]:
    """Hold the lock of a local output folder while the block runs; a second build waits for it, with a message.

    The parts of one build write different files and do not lock. Object storage has no locks. Raises StorageError for
    a folder that cannot be written.
    """
    path = storage.local_path(output)
    if path is None or storage.exists(storage.join(output, MANIFEST)):  # a data set is never written again
        yield
        return
    folder = Path(path)
    is_new = not folder.exists()
    descriptor = _acquire(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # not empty: the build has begun
                folder.rmdir()


def _acquire(folder: Path) -> int:
    """Return the descriptor of the locked file: of the one that is there, not of one that was just removed."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be written ({error.strerror}); make room, or name another folder"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _logger.warning("%s: another process builds into this folder; waiting until it ends", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
                return descriptor
        os.close(descriptor)
