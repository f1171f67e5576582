"""Cache of decoded clips or features for the length of a step, in GPU memory or shared host memory.

The cache has a row for each of its clips. A row is filled when its clip is first read, and never removed. Damaged
clips are not cached, so they are found, and counted, in each epoch. In host memory one cache serves the ranks and
decoding processes of a node. Its memory has no name in the file system: it is freed when its processes end.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.batch import Batch, PartialBatch
from avcil_dist.data.decode_pool import TensorPair
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.sampler import Request
from avcil_dist.data.shared_memory import SharedMemory

PAGE = 4096


@dataclass(frozen=True)
class EntrySpec:
    """Shapes of a clip's visual and audio tensors, and their type."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of visual and audio."""
        visual, audio = (math.prod(shape) * self.dtype.itemsize for shape in self.shapes)
        return visual, audio

    @classmethod
    def of(cls, manifest: Manifest, inputs: ClipInputs) -> "EntrySpec":
        """Return the shapes and the type of a manifest's clips after decoding."""
        if manifest.kind == "feature":
            shape = manifest.shape
            return cls(((shape["frames"], shape["positions"], shape["dim"]), (shape["dim"],)), torch.float16)
        return cls(inputs.shapes, torch.float32)


class ClipCache:
    """Cache with a row for each of `clips` (n,), ascending numbers.

    In the tier `host` the rows are in shared memory, in the tier `device` on the device of the process that made the
    cache. Which rows are filled is in shared memory in both tiers: a pickled copy in a decoding process can mark the
    missing rows of a request, but cannot add or return rows.
    """

    def __init__(
        self, clips: np.ndarray, spec: EntrySpec, device: torch.device | None, path: str | None = None
    ) -> None:
        """`device` None: in host memory, mapped by `path` where another process has made it."""
        self.clips, self.tier = clips, "device" if device else "host"
        starts = [0]  # of the flags of filled rows, of visual, of audio
        for size in (1, *spec.sizes):
            starts.append(starts[-1] + -(-len(clips) * size // PAGE) * PAGE)
        self.memory = SharedMemory(starts[1] if device else starts[3], path)
        self._tensors: list[Tensor] = []
        for shape, start, size in zip(spec.shapes, starts[1:3], spec.sizes, strict=True):
            if device:
                self._tensors.append(torch.empty((len(clips), *shape), dtype=spec.dtype, device=device))
            else:
                flat = torch.from_numpy(self.memory.bytes[start : start + len(clips) * size])
                self._tensors.append(flat.view(spec.dtype).view(len(clips), *shape))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tensors": []}  # decoding processes only mark missing rows

    def mark_missing(self, request: Request) -> Request:
        """Return the request with the rows to read: those that are not cached."""
        missing = ~self._is_filled(self._slots(request.clips))
        return replace(request, missing=None if missing.all() else missing)

    def complete(self, partial: PartialBatch) -> Batch:
        """Add the rows that were read to the cache, and return the batch with all its rows.

        A batch with cached rows is on the device of the cache; in page-locked memory where the rows read are.
        """
        batch, is_read = partial.batch, partial.is_read
        tensors = batch.visual, batch.audio
        self.put(batch.clips[is_read], tensors, batch.valid.numpy()[is_read])
        if is_read.all():
            return batch
        # Not that of `tensors`: without a row they have no memory that could be page-locked.
        visual, audio = self._merge(batch.clips, is_read, tensors, is_pinned=batch.labels.is_pinned())
        return replace(batch, visual=visual, audio=audio)

    def put(self, clips: np.ndarray, tensors: TensorPair, valid: np.ndarray) -> None:
        """Add the rows of visual and audio that are valid and of clips that have a row."""
        slots = self._slots(clips)
        new = np.flatnonzero((slots >= 0) & ~self._is_filled(slots) & valid)
        if not len(new):
            return
        for cached, read in zip(self._tensors, tensors, strict=True):
            chosen = read if len(new) == len(read) else read[torch.from_numpy(new)]
            cached.index_copy_(0, self._index(slots[new]), chosen.to(cached.device, non_blocking=True))
        self.memory.bytes[slots[new]] = 1  # last: a process that sees the flag finds the row

    def _merge(self, clips: np.ndarray, is_read: np.ndarray, tensors: TensorPair, *, is_pinned: bool) -> TensorPair:
        """Return visual and audio of all `clips`: `tensors` are the rows in `is_read`, the others are cached.

        In host memory they are page-locked if `is_pinned`.
        """
        slots = self._slots(clips)
        slots[is_read] = slots[~is_read][0]  # any filled row: it is overwritten
        rows = np.flatnonzero(is_read)
        visual, audio = (
            self._gather(cached, slots, rows, read, is_pinned)
            for cached, read in zip(self._tensors, tensors, strict=True)
        )
        return visual, audio

    def _gather(self, cached: Tensor, slots: np.ndarray, rows: np.ndarray, read: Tensor, is_pinned: bool) -> Tensor:
        shape, is_pinned = (len(slots), *cached.shape[1:]), is_pinned and cached.device.type == "cpu"
        gathered = torch.empty(shape, dtype=cached.dtype, device=cached.device, pin_memory=is_pinned)
        torch.index_select(cached, 0, self._index(slots), out=gathered)
        if len(rows):
            gathered.index_copy_(0, self._index(rows), read.to(cached.device, non_blocking=True))
        return gathered

    def _index(self, rows: np.ndarray) -> Tensor:
        index = torch.from_numpy(rows)
        device = self._tensors[0].device
        return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index

    def _slots(self, clips: np.ndarray) -> np.ndarray:
        """Return the row of each clip in the cache; -1 for a clip without one."""
        nearest = np.minimum(np.searchsorted(self.clips, clips), len(self.clips) - 1)
        return np.where(self.clips[nearest] == clips, nearest, -1)

    def _is_filled(self, slots: np.ndarray) -> np.ndarray:
        return (slots >= 0) & (self.memory.bytes[slots] == 1)
