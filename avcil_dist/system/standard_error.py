"""Standard error of a process: a full disk or a closed pipe behind it drops lines, and ends nothing.

A training runs for days. Its log may be on a disk that becomes full, or in a pipe whose reader ends.
"""

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any

STANDARD = (0, 1, 2)


def keep_standard_error() -> None:
    """Make writes to `sys.stderr` of this process never fail; what cannot be written is dropped.

    A standard stream that the parent closed becomes the null device: otherwise the next file that is opened gets its
    number, and libraries print into that file.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the smallest number that is free
            assert opened == number
    stream = sys.stderr
    if stream is None or stream is sys.__stderr__:  # else a test or a notebook has put one of its own there
        encoding = getattr(stream, "encoding", "utf-8")
        raw = _DroppingFile(2, "w", closefd=False)
        sys.stderr = TextIOWrapper(BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True)


class _DroppingFile(FileIO):
    """A file that accepts everything, and drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them. Returns their number."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(memoryview(data)) if written is None else written
