"""Append-only file of records, the acknowledgement of what is in it: a value is delivered once its record is on disk.

A tracker's own file, not the cursor of the queue, decides what is sent again after a kill. The file is read when a
sender opens it: half a record at its end, as a killed process leaves, is cut off, and what is left counts as delivered.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path


class RecordFile(ABC):
    """A local file of records; a subclass defines their frame. One process at a time writes to it."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises OSError, also for a link: a stream's folder may come from somebody else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent, path.parent.parent):
            if folder.is_symlink():
                raise OSError(errno.ELOOP, "a symbolic link is no folder of a tracker", str(folder))
        self.path = path
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o666), "a+b", buffering=0)
        self.last = self.size = 0  # begin and end of the last whole record
        self.was_cut = False

    @abstractmethod
    def frame(self, record: bytes, offset: int) -> bytes:
        """Return the bytes of a record that begins at `offset`."""

    @abstractmethod
    def scan(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield the records of a file with the offset behind each, up to the first that is not whole."""

    def read(self) -> Iterator[bytes]:
        """Yield the whole records; `size` is the end of each. Then cut off what follows them."""
        data = self.path.read_bytes()
        for record, end in self.scan(data):
            self.last, self.size = self.size, end
            yield record
        if self.size < len(data):
            self.was_cut = True
            self.truncate(self.size)

    def append(self, record: bytes) -> None:
        """Write a record. Raises OSError."""
        data = self.frame(record, self.size)
        self.last, self.size = self.size, self.size + len(data)
        while data:
            data = data[self._file.write(data) :]

    def truncate(self, size: int) -> None:
        """Cut the file."""
        os.ftruncate(self._file.fileno(), size)
        self.size = size

    def sync(self) -> None:
        """Return once all records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
