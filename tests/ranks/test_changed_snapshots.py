"""Snapshots whose files fit their commit, but not the step: refused in one line before training continues."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.errors import ArtifactError
from avcil_dist.streams.commit import COMMITTED
from avcil_dist.streams.snapshots import newest_snapshot
from avcil_dist.world import World
from tests.helpers.ranks import run_ranks
from tests.unit.test_trainer import resolve, run, stop_after

Change = Callable[[bytes], bytes]


def of_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    return lambda data: safetensors.torch.save(change(safetensors.torch.load(data)))


def of_json(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    return lambda data: json.dumps(change(json.loads(data))).encode()


CHANGES: dict[str, tuple[str, Change, str]] = {
    "later-than-the-step": ("training.json", of_json(lambda t: t | {"iteration": 10**6}), "a snapshot of iteration"),
    "over-without-best": ("training.json", of_json(lambda t: t | {"iteration": 24, "best": None}), "of iteration 24"),
    "no-totals": ("training.json", of_json(lambda t: t | {"totals": 3}), "totals: Input should be an object"),
    "other-type": (
        "model_000.safetensors",
        of_tensors(lambda w: {name: values.half() for name, values in w.items()}),
        "of another type",
    ),
    "optimizer-of-words": (
        "optimizer_000.safetensors",
        of_tensors(lambda w: {f"x{name}": values for name, values in w.items()}),
        "is not of this network and optimizer",
    ),
    "optimizer-of-another-shape": (
        "optimizer_000.safetensors",
        of_tensors(lambda w: {name: values.flatten()[:1] for name, values in w.items()}),
        "has another shape",
    ),
    "longer-than-the-network": (
        "model_000.safetensors",
        of_tensors(lambda w: {name: torch.cat([values, values]) for name, values in w.items()}),
        "has another shape",
    ),
    "not-a-part": ("best_000.safetensors", of_tensors(lambda w: {"x": torch.zeros(2)}), "x is no part of a tensor"),
    "no-updates": (
        "optimizer_000.safetensors",
        of_tensors(lambda w: {name: values for name, values in w.items() if not name.startswith("step/")}),
        "has no number of updates",
    ),
}


def refused_then_resumed(world: World, config: Config) -> int:
    """Change a snapshot in each way, and continue from it as it was; returns the iteration that it continues from."""
    stop_after(config, 9)
    found = newest_snapshot(config, 0)
    assert found is not None
    folder = Path(found.folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, change, message in CHANGES.values():
        data = change(before[name])
        commit = json.loads(before[COMMITTED])
        commit["files"][name] = {"size": len(data), "sha256": storage.sha256(data)}
        (folder / name).write_bytes(data)
        (folder / COMMITTED).write_text(json.dumps(commit))
        with pytest.raises(ArtifactError, match=message) as caught:
            run(config)
        assert len(str(caught.value).splitlines()) == 1
        (folder / name).write_bytes(before[name])
    (folder / COMMITTED).write_bytes(before[COMMITTED])
    return run(config).started_from


def test_a_snapshot_that_fits_no_step_is_one_line(tmp_path: Path) -> None:
    assert run_ranks(refused_then_resumed, 1, resolve(tmp_path)) == [10]
