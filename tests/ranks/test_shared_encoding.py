"""Encoders shared by student and teacher run once for both, with the losses of running them twice."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig, MethodConfig
from avcil_dist.data.batch import Batch
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext
from avcil_dist.models.network import AudioVisualNetwork, build_network
from avcil_dist.scenario import Scenario
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.train_step import train_step
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

CLIP = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
TINY = {"weights": "random", "dim": 24, "depth": 2, "heads": 2}
SCENARIO = Scenario((("a", "b", "c"), ("d", "e")))
ROWS, CURRENT = 6, 4
CASES = [(0, 6, "replicated"), (0, 3, "replicated"), (3, 6, "replicated"), (3, 3, "sharded")]


class Counts(NamedTuple):
    """How often a body ran in two iterations (teacher's and student's VideoMAE, student's AudioMAE); the losses."""

    teacher: int
    student: int
    audio: int
    losses: list[float]


def make_network(num_classes: int) -> AudioVisualNetwork:
    """VideoMAE frozen, AudioMAE trained in full; every call has the same encoders, as student and teacher have."""
    config = {"visual": {"kind": "videomae", **TINY}, "audio": {"kind": "audiomae", "train": "full", **TINY}}
    torch.manual_seed(0)
    network = build_network(ModelConfig.model_validate(config), CLIP, {}, num_classes)
    assert isinstance(network, AudioVisualNetwork)
    return network


def make_batch(world: World, seed: int) -> Batch:
    random = torch.Generator().manual_seed(2 * seed + world.rank)
    visual, audio = torch.randn(ROWS, 4, 3, 32, 32, generator=random), torch.randn(ROWS, 64, 32, generator=random)
    return Batch(visual, audio, torch.tensor([3, 4, 3, 4, 0, 2]), torch.ones(ROWS, dtype=torch.bool), CURRENT)


def count_runs(module: nn.Module) -> list[None]:
    """A list that grows by one whenever the module runs."""
    runs: list[None] = []
    module.register_forward_hook(lambda *_: runs.append(None))
    return runs


def count_and_train(world: World, stage: int, rows: int, kind: str, shared: bool) -> Counts:
    method = make_method(MethodConfig(name="avcil"))
    method.begin_step(StepContext(SCENARIO, 1))
    student, teacher_network = make_network(5), make_network(3)
    if not shared:  # still without gradient, but as an encoder that each of them runs for itself
        student.visual_encoder.frozen = teacher_network.visual_encoder.frozen = False
    teacher = Teacher(teacher_network, CPU)
    if kind == "sharded":
        teacher.shard(world)
    bodies = teacher_network.visual_encoder.body, student.visual_encoder.body, student.audio_encoder.body
    runs = [count_runs(body) for body in bodies]
    config = EngineConfig(zero_stage=stage, micro_batch=rows)
    engine = Engine(
        student.train(), build_optimizer(student, OptimConfig()), config=config, rows=rows, world=world, device=CPU
    )
    batches = [make_batch(world, seed) for seed in range(2)]
    losses = [train_step(engine, batch, method=method, teacher=teacher).parts["loss"].item() for batch in batches]
    engine.close()
    return Counts(*map(len, runs), losses)


def all_cases(world: World) -> list[tuple[Counts, Counts]]:
    return [(count_and_train(world, *case, shared=True), count_and_train(world, *case, shared=False)) for case in CASES]


def test_a_frozen_encoder_runs_once_for_student_and_teacher() -> None:
    found = run_ranks(all_cases, 2)[0]
    for (stage, rows, kind), (shared, alone) in zip(CASES, found, strict=True):
        micro_batches = ROWS // rows
        case = f"ZeRO {stage}, {rows} rows at a time, teacher {kind}"
        assert (shared.teacher, shared.student) == (2 * micro_batches, 0), case
        assert alone.teacher > shared.teacher, case
        assert alone.student == shared.audio == alone.audio > 0, case
        assert shared.losses == pytest.approx(alone.losses, rel=1e-5), case
        assert shared.losses == pytest.approx(found[0][0].losses, rel=1e-5), case
