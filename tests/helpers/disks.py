"""Disks with faults: small ones, and folders that can only be read. They are mounted, which needs root."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

READ_ONLY, REMOUNT, BIND, DETACH = 1, 32, 4096, 2  # MS_RDONLY, MS_REMOUNT, MS_BIND, MNT_DETACH


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A disk of this size at the folder, which is made; the test is skipped where none can be mounted."""
    folder.mkdir()
    _mount("tmpfs", folder, "tmpfs", 0, f"size={kilobytes}k")
    try:
        yield
    finally:
        _unmount(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """From here on nothing below the folder can be written, by processes that run already either."""
    _mount(str(folder), folder, "", BIND, "")
    try:
        _mount("", folder, "", REMOUNT | BIND | READ_ONLY, "")
        yield
    finally:
        _unmount(folder)


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    words = [os.fsencode(word) for word in (source, target, kind)]
    if ctypes.CDLL(None, use_errno=True).mount(*words, flags, os.fsencode(options)):
        pytest.skip(f"nothing can be mounted here ({os.strerror(ctypes.get_errno())}; needs root)")


def _unmount(folder: Path) -> None:
    assert ctypes.CDLL(None).umount2(os.fsencode(folder), DETACH) == 0
