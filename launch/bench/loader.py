"""Rate of loading batches of features, beside plain reading of the files."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.batch import Batch
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.plan import NO_CLIPS
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards

SHARDS, EPOCHS, WINDOW = 8, 5, 16


def rate(count: Callable[[], float]) -> float:
    """Return the result of `count` per second of its run."""
    started = time.perf_counter()
    amount = count()
    return amount / (time.perf_counter() - started)


def best_rate(repeats: int, count: Callable[[], float]) -> float:
    """Return the best rate of several runs, because other processes may use the machine."""
    return max(rate(count) for _ in range(repeats))


def read_in_sequence(paths: list[Path]) -> float:
    """Read whole files one after the other; return their size in GB."""
    buffer, total = bytearray(1 << 20), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / 1e9


def our_batches(url: str, epochs: int, batch: int, **settings: Any) -> Iterable[Batch]:
    """Load all training batches of a step over all classes; `settings` are those of the section `data`."""
    manifest = load_manifest(url)
    source = TrainingSampler(
        manifest=manifest,
        classes=manifest.classes,
        exemplars=NO_CLIPS,
        data=DataConfig.model_validate({"manifest": url, "shuffle_window": WINDOW} | settings),
        optim=OptimConfig(epochs=epochs, global_batch=batch),
        seed=0,
        step=0,
        world=World(0, 1, 0, 1, "127.0.0.1", 1, launcher="local"),
    )
    labels = {name: number for number, name in enumerate(manifest.classes)}
    return load_batches(source, manifest=manifest, labels=labels, data=source.data)


def our_rates(url: str, batch: int, **settings: Any) -> tuple[float, float]:
    """Return the rate of visual features in GB/s, of the first epoch and of the best later one."""
    marks, total = [time.perf_counter()], 0
    per_epoch = int(load_manifest(url).first_clips[-1]) // batch
    for number, loaded in enumerate(our_batches(url, EPOCHS, batch, **settings), start=1):
        total += loaded.visual.nbytes
        if number % per_epoch == 0:
            marks.append(time.perf_counter())
    seconds = np.diff(marks)
    return total / EPOCHS / 1e9 / seconds[0], total / EPOCHS / 1e9 / seconds[1:].min()


def make_shards(folder: Path, clips: int, frames: int, positions: int, dim: int) -> Manifest:
    """Write random training features in equal shards, one per class; they are in the page cache afterwards."""
    each = clips // SHARDS
    url = make_feature_shards(
        folder,
        classes=SHARDS,
        clips={"train": each},
        frames=frames,
        positions=positions,
        dim=dim,
        clips_per_shard=each,
    )
    return load_manifest(url)


def measure_loader(
    folder: Path, *, clips: int, batch: int, frames: int, positions: int, dim: int, repeats: int
) -> dict[str, Any]:
    """Measure plain reading and the loader, in GB/s; each is the best of `repeats` runs."""
    manifest = make_shards(folder, clips, frames, positions, dim)
    paths = [Path(manifest.url(number)) for number in range(len(manifest.shards))]
    read_in_sequence(paths)
    rates = {"sequential read": best_rate(repeats, lambda: read_in_sequence(paths))}
    measured = [our_rates(f"{folder}/manifest.json", batch) for _ in range(repeats)]
    rates["loader, first epoch of a process"] = max(first for first, _ in measured)
    rates["loader, epochs after it"] = max(later for _, later in measured)
    return {"clips": clips, "batch": batch, "shape": [frames, positions, dim], "gigabytes_per_second": rates}
