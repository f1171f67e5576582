"""Memory layout of a batch and its decoding to tensors: one layout for features, one for clips.

Features are read directly into the batch's tensors, and each header is checked: no object per clip is made. Clips
are read as mp4 bytes, and each row is decoded by itself (`decode_pool.py`).
"""

import io
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from avcil_dist.config.schema import AugmentConfig
from avcil_dist.data.decode_pool import ClipDecoder, DecodePool, EncodedClip, HereDecoder, LethalClips, TensorPair
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.noise import InputNoise
from avcil_dist.data.npy import parse_npy
from avcil_dist.data.plan import PADDING
from avcil_dist.data.reader import Segment
from avcil_dist.data.sampler import AugmentSeeds
from avcil_dist.data.shard import TAR_BLOCK
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import DataError

NAME_BYTES = 100
SPARE_BUFFERS = 8
Faults = dict[int, DataError]


@dataclass
class BatchBuffers:
    """Buffers of a batch that is being read: the clips of its rows, the segments to read, and their targets.

    `heads[member][row]` receives the first bytes of a member, from its tar header on; `bodies[member][row]` the
    rest.
    """

    clips: np.ndarray
    segments: list[Segment] = field(default_factory=list)
    heads: list[list[memoryview]] = field(default_factory=list)
    bodies: list[list[memoryview]] = field(default_factory=list)
    tensors: TensorPair | None = None


class Layout(Protocol):
    """Allocation and decoding of batches of one kind of shard."""

    def allocate(self, clips: np.ndarray) -> BatchBuffers:
        """Allocate the buffers of a batch of these clips."""

    def decode(self, rows: BatchBuffers, faults: Faults, seeds: AugmentSeeds | None) -> Callable[[], TensorPair]:
        """Start to decode. The result waits for the end, and returns visual and audio of all rows.

        They are zero in rows without a clip; damaged rows are added to `faults`. Clips are augmented if there are
        `seeds`; features never.
        """

    def batches_ahead(self, num_rows: int) -> int:
        """Number of batches of `num_rows` that are decoded while another is used."""

    def close(self) -> None:
        """End the decoding processes, if any."""


class FeatureLayout:
    """Layout of features, float16, read into the batch's tensors (page-locked memory if `pin`), with any `noise`."""

    members = ("visual.npy", "audio.npy")

    def __init__(self, manifest: Manifest, *, pin: bool, noise: InputNoise | None = None) -> None:
        self.manifest, self.noise = manifest, noise
        shape = manifest.shape
        self.shapes = (shape["frames"], shape["positions"], shape["dim"]), (shape["dim"],)
        self.headers = [_npy_header((shape["frames"] * shape["positions"], shape["dim"])), _npy_header(self.shapes[1])]
        self._buffers = _Buffers(pin, torch.float16)

    def allocate(self, clips: np.ndarray) -> BatchBuffers:
        """Allocate tensors for the batch; a member of unexpected size gets a separate buffer."""
        rows = BatchBuffers(clips)
        tensors = [self._buffers.take((len(clips), *shape)) for shape in self.shapes]
        rows.tensors = tensors[0], tensors[1]
        present = np.flatnonzero(clips != PADDING)
        shards = self.manifest.shards_of(clips)
        for member, header, tensor in zip(self.members, self.headers, tensors, strict=True):
            flat = tensor.numpy().reshape(len(clips), math.prod(tensor.shape[1:])).view(np.uint8)
            starts, sizes = self.manifest.spans(member, clips)
            heads = memoryview(bytearray(len(clips) * (TAR_BLOCK + len(header))))
            step = TAR_BLOCK + len(header)
            rows.heads.append([heads[row * step : (row + 1) * step] for row in range(len(clips))])
            rows.bodies.append([row.data for row in flat])
            for row in present:
                if sizes[row] != len(header) + flat.shape[1]:
                    rows.heads[-1][row] = memoryview(bytearray(TAR_BLOCK))
                    rows.bodies[-1][row] = memoryview(bytearray(int(sizes[row])))
                buffers = (rows.heads[-1][row], rows.bodies[-1][row])
                rows.segments.append(Segment(int(shards[row]), int(starts[row]) - TAR_BLOCK, buffers, int(row)))
        return rows

    def decode(self, rows: BatchBuffers, faults: Faults, seeds: AugmentSeeds | None) -> Callable[[], TensorPair]:
        """Compare each header with the expected one; a member with another header is parsed by numpy."""
        return partial(self._checked, rows, faults)

    def batches_ahead(self, num_rows: int) -> int:
        """None: they are read ahead."""
        return 0

    def close(self) -> None:
        """There are no processes."""

    def _checked(self, rows: BatchBuffers, faults: Faults) -> TensorPair:
        assert rows.tensors is not None
        for row, clip in enumerate(rows.clips):
            if clip == PADDING or row in faults:
                continue
            key = self.manifest.key(int(clip))
            try:
                for number, member in enumerate(self.members):
                    head = rows.heads[number][row]
                    _check_name(head, f"{key}.{member}")
                    if head[TAR_BLOCK:] != self.headers[number]:
                        data = bytes(head[TAR_BLOCK:]) + bytes(rows.bodies[number][row])
                        rows.tensors[number][row] = self._parse(data, key, number)
            except DataError as error:
                faults[row] = error
            else:
                if self.noise:
                    visual, audio = (tensor[row] for tensor in rows.tensors)
                    visual.copy_(self.noise.on_visual(visual, key))
                    audio.copy_(self.noise.on_audio(audio, key))
        _clear(rows, faults)
        return rows.tensors

    def _parse(self, data: bytes, key: str, number: int) -> Tensor:
        where = f"{key}: not features of {self.shapes[0]} and {self.shapes[1]}: {self.members[number]}"
        values = parse_npy(data, where)
        if values.size != math.prod(self.shapes[number]):
            raise DataError(f"{where}: shape {values.shape}")
        return torch.from_numpy(values).view(self.shapes[number])


class ClipLayout:
    """Layout of mp4 clips, decoded to frames and filterbanks, float32, by `num_processes`; 0: by the calling one.

    `lethal` is the record of clips that ended processes (see `DecodePool`).
    """

    member = "mp4"

    def __init__(
        self,
        manifest: Manifest,
        clip: ClipInputs,
        augment: AugmentConfig,
        *,
        num_processes: int,
        pin: bool,
        lethal: LethalClips,
        noise: InputNoise | None = None,
    ) -> None:
        self.manifest, self.num_processes = manifest, num_processes
        self.shapes = clip.shapes
        self._buffers = _Buffers(pin, torch.float32)
        transform = ClipTransform(clip, augment, noise)
        self._decoder: ClipDecoder = HereDecoder(transform)
        if num_processes:
            self._decoder = DecodePool(transform, self.shapes, num_processes, lethal)

    def batches_ahead(self, num_rows: int) -> int:
        """As many as give every process a clip while the oldest batch waits for its last one."""
        return 1 + -(-self.num_processes // num_rows) if self.num_processes else 0

    def close(self) -> None:
        """End the decoding processes."""
        self._decoder.close()

    def allocate(self, clips: np.ndarray) -> BatchBuffers:
        """Allocate bytes for each row."""
        starts, sizes = self.manifest.spans(self.member, clips)
        shards = self.manifest.shards_of(clips)
        heads = [memoryview(bytearray(TAR_BLOCK)) for _ in clips]
        bodies = [
            memoryview(bytearray(0 if clip == PADDING else int(size))) for clip, size in zip(clips, sizes, strict=True)
        ]
        segments = [
            Segment(int(shards[row]), int(starts[row]) - TAR_BLOCK, (heads[row], bodies[row]), int(row))
            for row in np.flatnonzero(clips != PADDING)
        ]
        return BatchBuffers(clips, segments, [heads], [bodies])

    def decode(self, rows: BatchBuffers, faults: Faults, seeds: AugmentSeeds | None) -> Callable[[], TensorPair]:
        """Start to decode each row."""
        visual, audio = (self._buffers.take((len(rows.clips), *shape)) for shape in self.shapes)
        rows.tensors = visual, audio
        coming: dict[int, Callable[[], DataError | None]] = {}
        for row, number in enumerate(rows.clips):
            if number == PADDING or row in faults:
                continue
            key = self.manifest.key(int(number))
            try:
                _check_name(rows.heads[0][row], f"{key}.{self.member}")
            except DataError as error:
                faults[row] = error
                continue
            seed = seeds.seed_of(row, key) if seeds else None
            clip = EncodedClip(int(number), key, rows.bodies[0][row], seed)
            coming[row] = self._decoder.submit(clip, (visual[row], audio[row]))

        def finish() -> TensorPair:
            for row, result in coming.items():
                if fault := result():
                    faults[row] = fault
            _clear(rows, faults)
            return visual, audio

        return finish


class _Buffers:
    """Pool of batch memory, reused once a batch is garbage: fresh pages cost more time than the read."""

    def __init__(self, pin: bool, dtype: torch.dtype) -> None:
        self._pin, self._dtype = pin, dtype
        self._spare: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor."""
        if self._pin:  # torch itself reuses page-locked memory once the copies from it are done
            return torch.empty(shape, dtype=self._dtype, pin_memory=True)
        size = self._dtype.itemsize * int(np.prod(shape))
        reusable = next((number for number, memory in enumerate(self._spare) if len(memory) == size), None)
        memory = np.empty(size, dtype=np.uint8) if reusable is None else self._spare.pop(reusable)
        array = memory.view(np.float16 if self._dtype == torch.float16 else np.float32).reshape(shape)
        weakref.finalize(array, _give_back, self._spare, memory).atexit = False
        return torch.from_numpy(array)


def _give_back(spare: list[np.ndarray], memory: np.ndarray) -> None:
    if len(spare) < SPARE_BUFFERS:
        spare.append(memory)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """The header that numpy writes before float16 values of `shape`."""
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _check_name(head: memoryview, name: str) -> None:
    """Raise DataError when a tar header is not that of `name` (it may have a folder in front)."""
    actual = bytes(head[:NAME_BYTES]).split(b"\0")[0].rsplit(b"/")[-1]
    expected = name.encode()
    if actual != expected and not (len(expected) > NAME_BYTES - 20 and actual and expected.startswith(actual)):
        raise DataError(f"{name.split('.')[0]}: the shard has no {name} at the offset in the manifest; it is damaged")


def _clear(rows: BatchBuffers, faults: Faults) -> None:
    """Zero the rows without a clip."""
    assert rows.tensors is not None
    for row in {*np.flatnonzero(rows.clips == PADDING).tolist(), *faults}:
        for tensor in rows.tensors:
            tensor[row] = 0
