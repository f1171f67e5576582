"""Two ranks with B clips each are one rank with 2B: in loss, gradient, weights and predictions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, Config, EngineConfig, MethodConfig
from avcil_dist.data.batch import Batch
from avcil_dist.data.manifest import load_manifest
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext
from avcil_dist.models.network import Network, build_network
from avcil_dist.scenario import Scenario
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.engine import Engine
from avcil_dist.training.evaluation import evaluate
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.train_step import gather_batch
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import check_same_metrics, last_artifact, train, write_config

CURRENT, EXEMPLARS, DIM = 8, 4, 16
SCENARIO = Scenario((("a", "b", "c"), ("d", "e")))
PRECOMPUTED = ModelConfig.model_validate({"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}})
SHAPE = {"frames": 2, "positions": 3, "dim": DIM}


def _network(num_classes: int, seed: int) -> Network:
    torch.manual_seed(seed)
    return build_network(PRECOMPUTED, ClipConfig(), SHAPE, num_classes)


def _batch_of(world: World, damaged: bool) -> Batch:
    """The rank's part of one fixed global batch; with `damaged`, a current clip and an exemplar are not valid."""
    random = torch.Generator().manual_seed(5)
    rows = CURRENT + EXEMPLARS
    visual, audio = torch.randn(rows, 2, 3, DIM, generator=random), torch.randn(rows, DIM, generator=random)
    labels = torch.tensor([3, 4] * (CURRENT // 2) + [0, 1, 2, 0])
    valid = torch.ones(rows, dtype=torch.bool)
    if damaged:
        valid[[1, CURRENT + 3]] = False
    mine = torch.cat(
        [
            torch.arange(CURRENT).chunk(world.size)[world.rank],
            CURRENT + torch.arange(EXEMPLARS).chunk(world.size)[world.rank],
        ]
    )
    return Batch(visual[mine], audio[mine], labels[mine], valid[mine], CURRENT // world.size)


def _loss_and_gradient(
    world: World, stage: int, options: dict[str, object], damaged: bool
) -> tuple[float, dict[str, np.ndarray]]:
    method = make_method(MethodConfig.model_validate({"name": "avcil"} | options))
    method.begin_step(StepContext(SCENARIO, 1))
    student = _network(5, seed=1)
    teacher = Teacher(_network(3, seed=2), CPU)
    batch = _batch_of(world, damaged)
    engine = Engine(
        student,
        build_optimizer(student, OptimConfig()),
        config=EngineConfig(zero_stage=stage),
        rows=len(batch.labels),
        world=world,
        device=CPU,
    )
    view = teacher.attention_view(batch) if method.needs.divergence else None
    gathered = gather_batch(batch, engine(batch.visual, batch.audio, view), teacher.output(batch, method))
    loss = method.loss(gathered.targets, gathered.output, gathered.teacher)["loss"]
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(value).numpy().copy() for name, value in student.named_parameters()}
    return loss.item(), gradients


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_two_ranks_give_the_loss_and_gradient_of_one(stage: int, variant: str) -> None:
    options = {"variant": variant}
    [(loss, gradients)] = run_ranks(_loss_and_gradient, 1, stage, options, False)
    for rank_loss, rank_gradients in run_ranks(_loss_and_gradient, 2, stage, options, False):
        assert rank_loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(rank_gradients[name], gradient, rtol=1e-5, atol=1e-6, err_msg=name)


def test_damaged_clips_leave_the_same_loss_on_any_number_of_ranks() -> None:
    [(loss, gradients)] = run_ranks(_loss_and_gradient, 1, 1, {}, True)
    (rank_loss, rank_gradients), _ = run_ranks(_loss_and_gradient, 2, 1, {}, True)
    [(whole, _)] = run_ranks(_loss_and_gradient, 1, 1, {}, False)
    assert rank_loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
    assert whole != pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(rank_gradients[name], gradient, rtol=1e-5, atol=1e-6, err_msg=name)


def _weights(stream: str) -> dict[str, Tensor]:
    return last_artifact(stream).model


@pytest.mark.parametrize("method", ["finetune", "avcil"])
def test_a_stream_on_two_processes_equals_one_process(tmp_path: Path, method: str) -> None:
    config = write_config(tmp_path)
    one = train(config, f"method={method}", f"output={tmp_path}/one")
    two = train(config, f"method={method}", f"output={tmp_path}/two", "-n", 2)
    check_same_metrics(last_artifact(two).metrics, last_artifact(one).metrics)
    assert last_artifact(two).memory == last_artifact(one).memory
    for name, weight in _weights(one).items():
        torch.testing.assert_close(_weights(two)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_weights_of_stage_0(tmp_path: Path, stage: int) -> None:
    config = write_config(tmp_path)
    plain = train(config, f"output={tmp_path}/plain", "-n", 2)
    sharded = train(config, f"engine=zero{stage}", f"output={tmp_path}/sharded", "-n", 2)
    assert _weights(sharded).keys() == _weights(plain).keys()
    for name, weight in _weights(plain).items():
        torch.testing.assert_close(_weights(sharded)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def _evaluate(world: World, config: Config, global_batch: int) -> tuple[list[int], list[int]]:
    manifest = load_manifest(config.data.manifest)
    method = make_method(config.method)
    torch.manual_seed(0)
    network = build_network(config.model, config.data.clip, manifest.shape, 6)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"global_eval_batch": global_batch})})
    step = Step(config, manifest, scenario_of(config, manifest), 2, method, world, CPU)
    found = evaluate(step, network, "test", step.inference())
    return found.labels.tolist(), found.predictions.tolist()


def test_evaluation_predicts_each_clip_once_whatever_the_ranks(tmp_path: Path) -> None:
    config = load_config(str(write_config(tmp_path)))
    [(labels, predictions)] = run_ranks(_evaluate, 1, config, 60)
    assert len(labels) == 60  # 6 classes of 10 test clips
    assert labels == sorted(labels)
    for batch in (2, 14, 60, 128):  # 128: the second rank's share is padding alone
        assert run_ranks(_evaluate, 2, config, batch) == [(labels, predictions)] * 2
