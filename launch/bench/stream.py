"""Speed of a stream: two steps on random features with the real trainer, and an estimate for a full run.

The second step, which has a teacher and exemplars, is measured.
"""

import math
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import ConfigError
from avcil_dist.system.accelerator import name_accelerator
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.device import local_device
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import run_step
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards

CLASSES = 4  # of each of the two steps
# VS100-CI: steps, epochs, training clips per step, and validation clips summed over steps
STEPS, EPOCHS, TRAIN, VAL = 10, 200, 5_119, 500 * sum(range(1, 11))


class _EpochTimes(Observer):
    """Observer that records the values of each epoch and the time of its end."""

    def __init__(self) -> None:
        self.epochs: list[tuple[float, dict[str, float]]] = []
        self.started = 0.0

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        """Start the clock."""
        self.started, self.epochs = time.monotonic(), []

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add an epoch."""
        self.epochs.append((time.monotonic(), dict(values)))


def measure_stream(
    folder: Path, *, iterations: int, clips: int, frames: int, positions: int, dim: int, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Train two steps of at least `iterations` iterations each; return the figures of the second.

    `clips` is the number of clips of an epoch. Raises ConfigError as a run does, and for fewer clips than a batch has.
    """
    each = math.ceil(clips / CLASSES)
    val = max(1, each // 10)
    shape = {"frames": frames, "positions": positions, "dim": dim}
    counts = {"train": each, "val": val, "test": 1}
    url = make_feature_shards(folder / "shards", classes=2 * CLASSES, clips=counts, **shape)  # type: ignore[arg-type]
    fixed = (
        f"data.manifest={url}",
        "data.source_disjoint=false",
        f"scenario.classes_per_step={CLASSES}",
        f"output={folder}/runs",
    )

    batch = load_config("vs100_ci", (*overrides, *fixed)).optim.global_batch
    per_epoch = each * CLASSES // batch
    if per_epoch == 0:
        raise ConfigError(
            f"--clips {clips} is less than optim.global_batch={batch}: increase --clips or reduce the batch"
        )
    epochs = max(2, math.ceil(iterations / per_epoch))
    config = load_config("vs100_ci", (*overrides, *fixed, f"optim.epochs={epochs}"))
    name_accelerator(local_device(World()).type)
    for step in (0, 1):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # a new process per step, as in a run
            times = process.submit(_run, config, step).result()
    return _figures(config, times, per_epoch, CLASSES * 2 * val)


def _run(config: Config, step: int) -> _EpochTimes:
    times = _EpochTimes()
    run_step(config, step, world=World(), observers=(times,), stop=StopRequest())
    return times


def _figures(config: Config, times: _EpochTimes, per_epoch: int, val_clips: int) -> dict[str, Any]:
    trained = [per_epoch * config.optim.global_batch / values["speed/clips_per_second"] for _, values in times.epochs]
    stalled = [values["data/stall_seconds"] for _, values in times.epochs]
    ends = [times.started, *(end for end, _ in times.epochs)]
    between = [later - earlier for earlier, later in pairwise(ends)]
    validating = max(0.0, sum(between[1:]) - sum(trained[1:]))  # the first includes the start of the engine
    later = len(trained) - 1
    clips_per_second = later * per_epoch * config.optim.global_batch / sum(trained[1:])
    batches = TRAIN // config.optim.global_batch
    whole = STEPS * EPOCHS * batches * config.optim.global_batch / clips_per_second
    whole_val = EPOCHS * VAL * validating / (later * val_clips)
    return {
        "batch": config.optim.global_batch,
        "replay_batch": config.optim.global_replay_batch,
        "iterations": per_epoch * len(trained),
        "iterations_per_second": clips_per_second / config.optim.global_batch,
        "clips_per_second": clips_per_second,
        "waiting_share_first_epoch": stalled[0] / trained[0],
        "waiting_share_later_epochs": sum(stalled[1:]) / sum(trained[1:]),
        "validation_clips_per_second": later * val_clips / validating if validating else None,
        "vs100_ci_hours": {"training": whole / 3600, "validation": whole_val / 3600},
    }
