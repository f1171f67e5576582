"""Batches of small data sets as a rank reads them, and their digests and counts."""

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, DataConfig
from avcil_dist.data.batch import Batch
from avcil_dist.data.inputs import IMAGENET_MEAN, IMAGENET_STD
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import FixedSampler, TrainingSampler
from avcil_dist.data.shard import Split
from avcil_dist.world import World
from tests.helpers.media import frame_number

NO_EXEMPLARS = np.empty(0, dtype=np.int64)


def training_source(
    manifest: Manifest,
    *,
    epochs: int = 1,
    batch: int = 8,
    start: int = 0,
    exemplars: np.ndarray = NO_EXEMPLARS,
    rank: int = 0,
    ranks: int = 1,
    **data: object,
) -> TrainingSampler:
    """The training batches of one step over all classes, or all but those of exemplars."""
    old = {manifest.class_of(int(clip)) for clip in exemplars}
    return TrainingSampler(
        manifest=manifest,
        classes=tuple(name for name in manifest.classes if name not in old),
        exemplars=exemplars,
        data=DataConfig.model_validate({"manifest": "-", "shuffle_window": 4} | data),
        optim=OptimConfig(epochs=epochs, global_batch=batch, global_replay_batch=batch // 2),
        seed=0,
        step=0,
        world=World(rank, ranks, rank, ranks, "127.0.0.1", 1, launcher="local"),
        start=start,
    )


def training_batches(url: str, **settings: object) -> Iterator[Batch]:
    """Return the batches that `load_batches` makes of `training_source`."""
    manifest = load_manifest(url)
    source = training_source(manifest, **settings)  # type: ignore[arg-type]
    return load_batches(source, manifest=manifest, labels=labels_of(manifest), data=source.data)


def clips_in_order(url: str, *, rows: int = 8, **data: object) -> list[Batch]:
    """All training clips in the manifest's order."""
    manifest = load_manifest(url)
    clips = manifest.clips(manifest.classes, "train")
    batches = np.full(-(-len(clips) // rows) * rows, -1)
    batches[: len(clips)] = clips
    settings = DataConfig.model_validate({"manifest": "-"} | data)
    source = FixedSampler(batches.reshape(-1, rows))
    return list(load_batches(source, manifest=manifest, labels=labels_of(manifest), data=settings))


def labels_of(manifest: Manifest) -> dict[str, int]:
    return {name: number for number, name in enumerate(manifest.classes)}


def digest(batch: Batch) -> str:
    """Return the digest of a batch, without its counts."""
    parts = [part.numpy().tobytes() for part in (batch.visual, batch.audio, batch.labels, batch.valid)]
    return hashlib.sha256(b"".join([*parts, str(batch.num_current).encode()])).hexdigest()


def digests(url: str, **settings: object) -> list[str]:
    """Return the digest of each training batch, computed while the next ones are read."""
    return [digest(batch) for batch in training_batches(url, **settings)]


def frame_numbers(manifest: Manifest, split: Split = "train") -> list[list[int]]:
    """The frames of `media` that training sees of each clip of a split: those at a quarter and three quarters of it."""
    clip = ClipConfig(frames=2, size=32, mel_bins=16, mel_frames=32)
    source = FixedSampler(manifest.clips(manifest.classes, split)[None])
    data = DataConfig(manifest="-", decode_workers=0, clip=clip)
    (batch,) = load_batches(source, manifest=manifest, labels=labels_of(manifest), data=data)
    assert batch.faults == ()
    greens = 255 * (batch.visual[:, :, 1, 16, 16] * IMAGENET_STD[1] + IMAGENET_MEAN[1])
    return [[frame_number(grey, near=20) for grey in clip] for clip in greens.tolist()]


def total(batches: list[Batch]) -> Counter[str]:
    """The batches' counts."""
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(batch.counts)
    return counts


def rows(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Visual, audio and valid of all batches' rows."""
    return (
        torch.cat([batch.visual for batch in batches]),
        torch.cat([batch.audio for batch in batches]),
        torch.cat([batch.valid for batch in batches]),
    )
