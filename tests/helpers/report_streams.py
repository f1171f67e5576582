"""Committed streams of any size without training: what reports are made of, written as steps write it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_to_yaml
from avcil_dist.streams.commit import write_commit, write_files
from avcil_dist.streams.metrics import EpochMetrics, MemoryUse, StreamMetrics, confusion
from avcil_dist.streams.region_shares import RegionShares


def write_streams(
    folder: Path,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    seeds: Sequence[int] = (0,),
    sizes: Sequence[int] = (2, 2, 2),
    epochs: int = 5,
    test_clips: int = 10,
    regions: bool = False,
) -> None:
    """Write a stream for each method, with its options, and seed; `sizes` are the classes per step.

    Accuracies fall with the age of a class, more for later methods; predictions are wrong towards newer classes.
    """
    for strength, (method, options) in enumerate(methods.items()):
        for seed in seeds:
            write_stream(
                folder / f"made-{method}-seed{seed}",
                method,
                options,
                seed=seed,
                sizes=sizes,
                loss=0.06 + 0.12 * strength,
                epochs=epochs,
                test_clips=test_clips,
                regions=regions,
            )


def write_stream(
    folder: Path,
    method: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    sizes: Sequence[int],
    loss: float,
    epochs: int,
    test_clips: int,
    regions: bool,
) -> None:
    """Write one stream; an old class loses the fraction `loss` of its clips with each step."""
    random = np.random.default_rng([seed, round(1000 * loss)])
    steps, first = [], 0
    for size in sizes:
        steps.append(
            [f"{_WORDS[n % len(_WORDS)]} & {_WORDS[n // 7 % len(_WORDS)]} no. {n}" for n in range(first, first + size)]
        )
        first += size
    config = Config.model_validate(
        {
            "name": "made",
            "seed": seed,
            "data": {"manifest": "manifest.json"},
            "scenario": {"classes_per_step": list(sizes)},
            "model": {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}},
            "method": {"name": method, **options},
            "optim": {"epochs": epochs},
        }
    )
    metrics = None
    for step in range(len(sizes)):
        metrics = _after(metrics, step, steps, random, loss, epochs, test_clips, regions)
        files = {
            "metrics.json": json.dumps(metrics.to_dict()).encode(),
            "scenario.json": json.dumps({"steps": steps}).encode(),
            "config.yaml": config_to_yaml(config).encode(),
        }
        artifact = str(folder / f"step_{step:03d}")
        write_commit(
            artifact,
            write_files(artifact, files),
            step=step,
            manifest_hash="0123456789abcdef",
            code_version="1.0",
            device="NVIDIA H100 80GB HBM3",
            ranks=8,
            seconds=1500.0 + 60 * step,
            source="0123456789ab",
        )


_WORDS = ("dog barking", "violin", "helicopter", "typing on a keyboard", "rain", "church bell", "race car")


def _after(
    previous: StreamMetrics | None,
    step: int,
    steps: Sequence[Sequence[str]],
    random: np.random.Generator,
    loss: float,
    epochs: int,
    test_clips: int,
    regions: bool,
) -> StreamMetrics:
    seen = [name for names in steps[: step + 1] for name in names]
    tasks = np.repeat(np.arange(step + 1), [len(names) for names in steps[: step + 1]])
    labels = np.repeat(np.arange(len(seen)), test_clips)
    right = np.clip(0.92 - loss * (step - tasks) + random.normal(0, 0.06, len(seen)), 0, 1)[labels]
    newer = random.integers(labels // 2, len(seen))
    predictions = np.where(random.random(len(labels)) < right, labels, newer)
    correct = labels == predictions
    accuracy = 1 - np.exp(-np.arange(1, epochs + 1) / max(epochs / 4, 1))
    made = [
        EpochMetrics(float(3 * (1 - a) + 0.2 + random.random() / 10), 1e-3, float(np.clip(0.9 * a, 0, 1)))
        for a in accuracy
    ]
    shares = None
    if regions:
        rows = np.array([[label, 0.25, max(0.25, 0.6 - loss * (step - tasks[label]))] for label in labels])
        first = np.cumsum([0, *(len(names) for names in steps[: step + 1])])
        slices = [slice(int(first[task]), int(first[task + 1])) for task in range(step + 1)]
        shares = RegionShares.of_clips(rows, slices, 0.25)
    return StreamMetrics.after(
        previous,
        step=step,
        row=[float(correct[tasks[labels] == task].mean()) for task in range(step + 1)],
        seen=float(correct.mean()),
        per_class={name: float(correct[labels == label].mean()) for label, name in enumerate(seen)},
        num_test_clips=len(labels),
        epoch=epochs - 1,
        num_epochs=epochs,
        val_accuracy=made[-1].val_accuracy,
        confusion=confusion(labels, predictions, seen),
        memory=MemoryUse(num_clips=20, clip_bytes=40_000_000, model_bytes=12_000_000, state_bytes=0),
        epochs=made,
        regions=shares,
    )
