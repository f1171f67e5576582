"""Smoke run: the same stream with two iterations per step, to see that all of it works before hours are spent.

Batches, networks, method, engine and tracking are those of the real run, so that memory and files are tested too; the
data are the first clips of each class. It has its own output folder and MLflow experiment, and registers no model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from avcil_dist.config.schema import Config, LimitConfig
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import Split
from avcil_dist.data.subset import load_data
from avcil_dist.scenario import Scenario
from avcil_dist.streams.stream import scenario_of

ITERATIONS = 2
FOLDER, EXPERIMENT = "smoke", "smoke"


def smoke_config(config: Config) -> Config:
    """Return the configuration of the smoke run of a stream. Raises DataError for a manifest that cannot be read."""
    manifest = load_data(config.data)
    limit = smoke_limit(config, manifest, scenario_of(config, manifest))
    optim: dict[str, Any] = {
        "epochs": 1,
        "validate_every": 1,
        "patience": None,
        "warmup_epochs": min(config.optim.warmup_epochs, 0.5),  # less than the one epoch
        "milestones": [],
        "schedule": "constant" if config.optim.schedule == "multistep" else config.optim.schedule,
    }
    return config.model_copy(
        update={
            "output": f"{config.output.rstrip('/')}/{FOLDER}",
            "data": config.data.model_copy(update={"limit": limit}),
            "optim": config.optim.model_copy(update=optim),
            "snapshot": config.snapshot.model_copy(update={"every_iterations": 1, "folder": None}),
            "tracking": config.tracking.model_copy(
                update={"experiment": f"{config.tracking.experiment}-{EXPERIMENT}", "register_as": "none"}
            ),
        }
    )


def smoke_limit(config: Config, manifest: Manifest, scenario: Scenario) -> LimitConfig:
    """Return the numbers of clips of a class that make two training batches of each step, and two to evaluate."""
    steps = range(scenario.num_steps)
    train = max(
        clips_per_class(_counts(manifest, scenario.new(step), "train"), ITERATIONS * config.optim.global_batch)
        for step in steps
    )
    evaluated = ITERATIONS * config.optim.global_eval_batch
    return LimitConfig(
        train=train,
        val=clips_per_class(_counts(manifest, scenario.classes, "val"), evaluated),
        test=clips_per_class(_counts(manifest, scenario.classes, "test"), evaluated),
    )


def clips_per_class(counts: Sequence[int], total: int) -> int:
    """Return the smallest limit with which classes of these sizes have `total` clips, or all that they have."""
    low, high = 1, max([*counts, 1])
    while low < high:
        middle = (low + high) // 2
        if int(np.minimum(counts, middle).sum()) >= min(total, sum(counts)):
            high = middle
        else:
            low = middle + 1
    return low


def _counts(manifest: Manifest, classes: Sequence[str], split: Split) -> list[int]:
    return [manifest.num_clips([name], split) for name in classes]
