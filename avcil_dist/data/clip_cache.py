"""Clips at hand: what was read once in a step comes from memory from then on, of the device or of the host.

A store has a row for each clip, filled when the clip is first read and never emptied; a damaged clip is never in
it, so it is met, and counted, each time. In host memory one store serves the ranks and decoding processes of a node.
It is memory without a name: nothing is left of it when its processes end, however they do.
"""

import math
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avcil_dist.config.schema import ClipConfig
from avcil_dist.data.layout import TensorPair
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.sampler import Request

PAGE = 4096


@dataclass(frozen=True)
class EntrySpec:
    """What a clip's tensors are: the shapes of visual and audio, and their type."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of visual and audio."""
        visual, audio = (math.prod(shape) * self.dtype.itemsize for shape in self.shapes)
        return visual, audio

    @classmethod
    def of(cls, manifest: Manifest, clip: ClipConfig) -> "EntrySpec":
        """What the clips of a manifest become."""
        if manifest.kind == "feature":
            shape = manifest.shape
            return cls(((shape["frames"], shape["positions"], shape["dim"]), (shape["dim"],)), torch.float16)
        pictures = clip.frames, 3, clip.size, clip.size
        return cls((pictures, (clip.mel_frames, clip.mel_bins)), torch.float32)


class SharedMemory:
    """Memory that other processes of the user can map by `path`, for as long as this object lives. Zero at first."""

    def __init__(self, size: int, path: str | None = None) -> None:
        """`path`: that of another process, to map the same. Raises OSError where that cannot be."""
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
        """Where others find it."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedMemory, (self.size, self.path)


class ClipCache:
    """The rows of `clips` (n,), ascending numbers. Picklable: a copy in another process knows what is there.

    In the tier `host` the rows are in shared memory, else on a device, where only the process that made it has them.
    """

    def __init__(
        self, clips: np.ndarray, kind: EntrySpec, device: torch.device | None, path: str | None = None
    ) -> None:
        """`device` None: in host memory, at `path` where another process has made it."""
        self.clips, self.tier = clips, "device" if device else "host"
        starts = [0]  # of the marks of what is there, of visual, of audio
        for size in (1, *kind.sizes):
            starts.append(starts[-1] + -(-len(clips) * size // PAGE) * PAGE)
        self.memory = SharedMemory(starts[1] if device else starts[3], path)
        self._rows: list[Tensor] = []
        for shape, start, size in zip(kind.shapes, starts[1:3], kind.sizes, strict=True):
            if device:
                self._rows.append(torch.empty((len(clips), *shape), dtype=kind.dtype, device=device))
            else:
                flat = torch.from_numpy(self.memory.bytes[start : start + len(clips) * size])
                self._rows.append(flat.view(kind.dtype).view(len(clips), *shape))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": []}  # who reads a part of a batch asks only what is missing

    def missing(self, request: Request) -> Request:
        """The part of a request that has to be read."""
        mask = ~self._is_there(self._slots(request.clips))
        return request if mask.all() else request.part(mask)

    def put(self, clips: np.ndarray, tensors: TensorPair, valid: np.ndarray) -> None:
        """Keep the rows of visual and audio that are valid and have a place."""
        slots = self._slots(clips)
        fresh = np.flatnonzero((slots >= 0) & ~self._is_there(slots) & valid)
        if not len(fresh):
            return
        for kept, read in zip(self._rows, tensors, strict=True):
            chosen = read if len(fresh) == len(read) else read[torch.from_numpy(fresh)]
            kept.index_copy_(0, self._index(slots[fresh]), chosen.to(kept.device, non_blocking=True))
        self.memory.bytes[slots[fresh]] = 1  # last: who sees it finds the row

    def whole(self, clips: np.ndarray, is_read: np.ndarray, tensors: TensorPair) -> TensorPair:
        """Visual and audio of all `clips`, of which the rows in `is_read` were missing and are `tensors`.

        They are on the store's device; page-locked where what was read is.
        """
        slots = self._slots(clips)
        slots[is_read] = slots[~is_read][0]  # any row that is there: it is written over
        rows = np.flatnonzero(is_read)
        visual, audio = (self._gather(kept, slots, rows, read) for kept, read in zip(self._rows, tensors, strict=True))
        return visual, audio

    def _gather(self, kept: Tensor, slots: np.ndarray, rows: np.ndarray, read: Tensor) -> Tensor:
        shape, is_pinned = (len(slots), *kept.shape[1:]), read.is_pinned() and kept.device.type == "cpu"
        found = torch.empty(shape, dtype=kept.dtype, device=kept.device, pin_memory=is_pinned)
        torch.index_select(kept, 0, self._index(slots), out=found)
        if len(rows):
            found.index_copy_(0, self._index(rows), read.to(kept.device, non_blocking=True))
        return found

    def _index(self, rows: np.ndarray) -> Tensor:
        index = torch.from_numpy(rows)
        device = self._rows[0].device
        return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index

    def _slots(self, clips: np.ndarray) -> np.ndarray:
        """The row of each clip; -1 for one without."""
        found = np.minimum(np.searchsorted(self.clips, clips), len(self.clips) - 1)
        return np.where(self.clips[found] == clips, found, -1)

    def _is_there(self, slots: np.ndarray) -> np.ndarray:
        return (slots >= 0) & (self.memory.bytes[slots] == 1)


@dataclass(frozen=True)
class UncachedRequests:
    """The parts of requests that a store has not, as they are asked for."""

    source: Iterable[Request]
    store: ClipCache

    def __iter__(self) -> Iterator[Request]:
        return map(self.store.missing, self.source)
