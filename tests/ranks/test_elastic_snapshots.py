"""Snapshots of a number of ranks continue on any other, at every ZeRO stage; a kill amid a write is harmless."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import StepStopped
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.snapshots import newest_snapshot, snapshots_url
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.tensors import write_tensors
from avcil_dist.system.signals import StopRequest
from avcil_dist.training import snapshot
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import check_same_metrics, run_steps, write_config

STEP = 1
PARTS = ((4, 5), (2, 4), (1, 3), (4, None))  # numbers of ranks, and of iterations up to the stop
STAGES = {"zero1": (1, 1, 1, 1), "zero2": (2, 2, 2, 2), "zero3": (3, 3, 3, 3), "changing": (3, 0, 2, 1)}
Curve = dict[int, float]
Found = tuple[Curve, StreamMetrics | None]  # the metrics of a step that is done


class Losses(Observer):
    """Losses by iteration, up to a stop after `count` of them."""

    def __init__(self, count: int | None) -> None:
        self.count, self.stop = count, StopRequest()
        self.losses: Curve = {}

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        self.losses[iteration] = values["loss/total"]
        if len(self.losses) == self.count:
            self.stop.set()


def curves(world: World, configs: Mapping[str, Config], count: int | None) -> dict[str, Found]:
    """The losses of the step of each stream in `count` iterations, or up to its end, and then its metrics."""
    found = {}
    for name, config in configs.items():
        observer, metrics = Losses(count), None
        try:
            done = step_in_group(config, STEP, world=world, observers=[observer], device=CPU, stop=observer.stop)
            metrics = done.metrics
        except StepStopped:
            assert count
        found[name] = observer.losses, metrics
    return found


def begin(world: World, whole: Config, configs: Mapping[str, Config], count: int) -> tuple[Found, dict[str, Found]]:
    """Train the first step once for all streams, then the whole second step of one and the beginning of the others."""
    run_steps(world, whole, [0])
    if world.is_main:
        for config in configs.values():
            shutil.copytree(stream_url(whole), stream_url(config))
    dist.barrier()
    return curves(world, {"whole": whole}, None)["whole"], curves(world, configs, count)


def test_a_step_continues_on_other_numbers_of_ranks_with_the_losses_of_an_undisturbed_one(tmp_path: Path) -> None:
    optim = {"epochs": 4, "global_batch": 12, "global_replay_batch": 8, "global_eval_batch": 16, "lr": 3e-4}
    file = write_config(tmp_path, optim=optim, tracking={"every": 1})

    def config_of(name: str, stage: int) -> Config:
        return load_config(str(file), [f"output={tmp_path}/{name}", f"engine.zero_stage={stage}"])

    def part(number: int) -> dict[str, Config]:
        return {name: config_of(name, stages[number]) for name, stages in STAGES.items()}

    (ranks, count), *others = PARTS
    (expected, metrics), found = run_ranks(begin, ranks, config_of("whole", 0), part(0), count)[0]
    for number, (ranks, count) in enumerate(others, 1):
        for name, (curve, ours) in run_ranks(curves, ranks, part(number), count)[0].items():
            assert not found[name][0].keys() & curve.keys()
            found[name] = found[name][0] | curve, ours
    assert len(expected) == 16
    for name, (curve, ours) in found.items():
        assert curve == pytest.approx(expected, rel=1e-5), name
        check_same_metrics(ours, metrics)


def killed_while_writing(world: World, config: Config) -> None:
    """Train the first step; rank 1 is killed in its second snapshot, in the middle of a file."""

    def write(url: str, tensors: Mapping[str, Tensor]) -> dict[str, object]:
        if world.rank == 1 and "/000000004/optimizer_" in url:
            Path(url).write_bytes(b"half")
            os._exit(9)
        return write_tensors(url, tensors)

    snapshot.write_tensors = write
    run_steps(world, config, [0])


def test_a_kill_while_a_snapshot_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    file = write_config(tmp_path, snapshot={"every_iterations": 2}, tracking={"every": 1})
    config = load_config(str(file), ["engine.zero_stage=2"])
    with pytest.raises(ProcessException):
        run_ranks(killed_while_writing, 2, config)
    found = newest_snapshot(config, 0)
    assert found is not None
    assert found.iteration == 2
    assert "000000004" in storage.list_folder(snapshots_url(config, 0))
    [curve] = run_ranks(first_step, 1, config)
    assert min(curve) == 3


def first_step(world: World, config: Config) -> Curve:
    """The losses of the first step, from its newest snapshot on."""
    observer = Losses(None)
    step_in_group(config, 0, world=world, observers=[observer], device=CPU, stop=observer.stop)
    return observer.losses
