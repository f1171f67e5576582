"""Batches as a rank trains on them: a WebDataset pipeline, plan → fetch → decode → collate.

Its source is the plan, its stages work on whole batches, and a batch keeps its shape when a clip
is damaged: the row stays, marked as not valid, so that all ranks go on in step.
"""

import io
import itertools
import tokenize
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data
import webdataset
from torch import Tensor

from avcil_dist.config import ClipConfig, DataConfig, OptimConfig
from avcil_dist.data.decode import decode_clip
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import NO_CLIPS, PADDING, plan_epoch, plan_replay, rank_share
from avcil_dist.data.reader import ShardReader
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import DataError
from avcil_dist.world import World

Pair = tuple[Tensor, Tensor]

# What numpy raises for damaged bytes: it reads the header as Python text, and a zip where they begin like one.
NPY_FAULTS = (ValueError, TypeError, RuntimeError, EOFError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch: `num_current` rows of the current step, then exemplars.

    `visual` (B, …) and `audio` (B, …) are pictures and filterbanks, or features; `labels` (B,)
    are positions in the class order; `valid` (B,) is false for padding and damaged clips, whose
    rows are zero; `faults` say what was damaged.
    """

    visual: Tensor
    audio: Tensor
    labels: Tensor
    valid: Tensor
    num_current: int
    faults: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("visual", "audio", "labels", "valid")
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies that overlap with compute."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("visual", "audio", "labels", "valid")}
        return replace(self, **pinned)


class Decoder(Protocol):
    """From the members of a clip to its two tensors."""

    @property
    def members(self) -> tuple[str, ...]:
        """The members it reads."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of both tensors."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of visual and audio."""

    def __call__(self, members: Mapping[str, bytes], key: str) -> Pair:
        """Raises DataError, naming the clip's key, for what cannot be decoded."""


@dataclass(frozen=True)
class Request:
    """The clip numbers of a rank's batch, in row order."""

    clips: np.ndarray
    num_current: int


@dataclass(frozen=True)
class TrainingSource:
    """All training batches of a step for one rank, from batch `start` on, epoch after epoch.

    `exemplars` come in batches of their own beside the current clips; `joined` ones are among them.
    """

    manifest: Manifest
    classes: tuple[str, ...]
    exemplars: np.ndarray
    data: DataConfig
    optim: OptimConfig
    seed: int
    step: int
    world: World
    start: int = 0
    joined: np.ndarray = field(default_factory=lambda: NO_CLIPS)

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """The epoch's global batches, (batches, optim.batch)."""
        return plan_epoch(
            self.manifest,
            self.classes,
            seed=self.seed,
            step=self.step,
            epoch=epoch,
            global_batch=self.optim.batch,
            canonical_nodes=self.data.canonical_nodes,
            window=self.data.window,
            exemplars=self.joined,
        ).batches

    def __iter__(self) -> Iterator[Request]:
        per_epoch = len(self.epoch_batches(0))
        for epoch in range(self.start // per_epoch, self.optim.epochs):
            first = max(self.start - epoch * per_epoch, 0)
            current = rank_share(self.epoch_batches(epoch)[first:], self.world.rank, self.world.size)
            rows = [current]
            if len(self.exemplars):
                replay = plan_replay(
                    self.exemplars,
                    seed=self.seed,
                    step=self.step,
                    first=epoch * per_epoch + first,
                    count=len(current),
                    global_batch=self.optim.replay_batch,
                )
                rows.append(rank_share(replay, self.world.rank, self.world.size))
            for clips in np.concatenate(rows, axis=1):
                yield Request(clips, num_current=current.shape[1])


@dataclass(frozen=True)
class FixedSource:
    """One pass over given batches (batches, rows), as evaluation makes."""

    batches: np.ndarray

    def __iter__(self) -> Iterator[Request]:
        return (Request(clips, num_current=len(clips)) for clips in self.batches)


def load_batches(
    source: Iterable[Request], *, manifest: Manifest, labels: Mapping[str, int], data: DataConfig, pin: bool = False
) -> Iterator[Batch]:
    """The batches of `source`, in its order, whatever the number of decoding processes."""
    decoder: Decoder = _ClipDecoder(data.clip) if manifest.kind == "clip" else _FeatureDecoder(manifest.shape)
    num_workers = data.workers if manifest.kind == "clip" else 0
    pipeline = webdataset.DataPipeline(
        _EachWorkersShare(source),
        _Fetch(ShardReader(manifest, decoder.members)),
        _Decode(decoder, manifest),
        _Collate(decoder, manifest, labels),
    )
    loader = webdataset.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="forkserver" if num_workers else None,
        pin_memory=pin,
    )
    return iter(loader)


class _EachWorkersShare(torch.utils.data.IterableDataset):
    """Worker w of W takes batches w, w + W, …: the loader asks the workers in turn, so the order stays."""

    def __init__(self, source: Iterable[Request]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Request]:
        worker = torch.utils.data.get_worker_info()
        return itertools.islice(self.source, worker.id, None, worker.num_workers) if worker else iter(self.source)


@dataclass(frozen=True)
class _Fetch:
    """Clip numbers to bytes; a clip that cannot be read becomes its DataError."""

    reader: ShardReader

    def __call__(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Any]]]:
        for request in requests:
            yield (
                request,
                [None if clip == PADDING else _or_fault(self.reader.read, int(clip)) for clip in request.clips],
            )


@dataclass(frozen=True)
class _Decode:
    """Bytes to tensors, with the same treatment of faults."""

    decoder: Decoder
    manifest: Manifest

    def __call__(self, batches: Iterable[tuple[Request, list[Any]]]) -> Iterator[tuple[Request, list[Any]]]:
        for request, items in batches:
            yield (
                request,
                [
                    _or_fault(self.decoder, item, self.manifest.key(clip)) if isinstance(item, Mapping) else item
                    for clip, item in zip(request.clips, items, strict=True)
                ],
            )


@dataclass(frozen=True)
class _Collate:
    """Decoded clips to one Batch; rows without a clip stay zero."""

    decoder: Decoder
    manifest: Manifest
    labels: Mapping[str, int]

    def __call__(self, batches: Iterable[tuple[Request, list[Any]]]) -> Iterator[Batch]:
        for request, items in batches:
            valid = [isinstance(item, tuple) for item in items]
            visual, audio = (
                torch.zeros((len(items), *shape), dtype=self.decoder.dtype) for shape in self.decoder.shapes
            )
            for row in np.flatnonzero(valid):
                visual[row], audio[row] = items[row]
            labels = [0 if clip == PADDING else self.labels[self.manifest.class_of(clip)] for clip in request.clips]
            faults = tuple(str(item) for item in items if isinstance(item, DataError))
            yield Batch(visual, audio, torch.tensor(labels), torch.tensor(valid), request.num_current, faults)


@dataclass(frozen=True)
class _ClipDecoder:
    """mp4 to pictures and filterbank."""

    clip: ClipConfig
    members = ("mp4",)
    dtype = torch.float32

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.clip.frames, 3, self.clip.size, self.clip.size), (self.clip.mel_frames, self.clip.mel_bins)

    def __call__(self, members: Mapping[str, bytes], key: str) -> Pair:
        clip = self.clip
        decoded = decode_clip(
            members["mp4"], num_frames=clip.frames, sample_rate=clip.sample_rate, silent=clip.silent, where=key
        )
        return ClipTransform(clip)(decoded)


@dataclass(frozen=True)
class _FeatureDecoder:
    """npy to features, in the type they are stored in."""

    shape: Mapping[str, int]
    members = ("visual.npy", "audio.npy")
    dtype = torch.float16

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.shape["frames"], self.shape["positions"], self.shape["dim"]), (self.shape["dim"],)

    def __call__(self, members: Mapping[str, bytes], key: str) -> Pair:
        try:
            arrays = [np.load(io.BytesIO(members[name]), allow_pickle=False) for name in self.members]
            visual, audio = (
                torch.from_numpy(array).view(shape) for array, shape in zip(arrays, self.shapes, strict=True)
            )
        except NPY_FAULTS as error:
            fault = " ".join(str(error).split())  # numpy explains itself on several lines
            raise DataError(f"{key}: not features of {self.shapes[0]} and {self.shapes[1]}: {fault}") from None
        return visual, audio


def _or_fault(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except DataError as error:
        return error
