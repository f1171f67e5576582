"""Memory that processes of a user share. It has no name in the file system: it is freed when its processes end."""

import mmap
import os
import weakref
from typing import Any

import numpy as np


class SharedMemory:
    """Memory that other processes of the user can map by `path` while this object lives. Initially zero."""

    def __init__(self, size: int, path: str | None = None) -> None:
        """`path`: the path of another process, to map its memory. Raises OSError where that is impossible."""
        self.size = size
        if path is None:
            self._descriptor = os.memfd_create("avcil-clips")
            os.ftruncate(self._descriptor, size)
        else:
            self._descriptor = os.open(path, os.O_RDWR)
        weakref.finalize(self, os.close, self._descriptor)
        self.bytes = np.frombuffer(mmap.mmap(self._descriptor, size), dtype=np.uint8)

    @property
    def path(self) -> str:
        """Path by which other processes map the memory."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedMemory, (self.size, self.path)
