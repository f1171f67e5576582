"""Room on the disk, checked before it is filled."""

import shutil
from pathlib import Path

from avcil_dist.errors import StorageError


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror}); name another folder") from None


def check_room(folder: Path, size: int, purpose: str) -> None:
    """Raise StorageError unless the disk of a folder has room for `size` bytes."""
    free = free_bytes(folder)
    if size > free:
        raise StorageError(
            f"{folder}: {in_words(size)} are needed {purpose}, {in_words(free)} are free; make room, or name a folder "
            "on another disk"
        )


def in_words(size: int) -> str:
    """Return a number of bytes in decimal units: `18.2 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
