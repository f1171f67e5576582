"""For each baseline, two ranks with B clips each give the loss and the gradient of one with 2B."""

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig, MethodConfig
from avcil_dist.data.batch import Batch
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.scenario import Scenario
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.train_step import gather_batch
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

ROWS, DIM = 12, 16
NUM_CURRENT = {"lwf": 12, "icarl": 12, "ssil": 8, "afc": 12}  # exemplars that join are current clips
LABELS = {"lwf": [3, 4] * 6, "ssil": [3, 4] * 4 + [0, 1, 2, 0]}
SCENARIO = Scenario((("a", "b", "c"), ("d", "e")))
SHAPE = {"frames": 2, "positions": 3, "dim": DIM}


def network(method: Method, num_classes: int, num_frozen: int, seed: int, modality: str) -> HeadedNetwork:
    torch.manual_seed(seed)
    encoders = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}, "modality": modality}
    model = ModelConfig.model_validate(encoders)
    network_spec = method.needs.network_spec
    made = build_network(model, ClipConfig(), SHAPE, num_classes, network_spec=network_spec, num_frozen=num_frozen)
    assert isinstance(made, HeadedNetwork)
    return made


def batch_of(world: World, name: str) -> Batch:
    """The rank's part of one fixed global batch in which one clip is damaged."""
    random = torch.Generator().manual_seed(5)
    visual, audio = torch.randn(ROWS, 2, 3, DIM, generator=random), torch.randn(ROWS, DIM, generator=random)
    labels = torch.tensor(LABELS.get(name, [3, 0, 4, 1, 2, 4] * 2))
    valid = torch.arange(ROWS) != 1
    current = torch.arange(NUM_CURRENT[name])
    parts = [rows.chunk(world.size)[world.rank] for rows in (current, torch.arange(len(current), ROWS)) if len(rows)]
    mine = torch.cat(parts)
    return Batch(visual[mine], audio[mine], labels[mine], valid[mine], len(parts[0]))


def loss_and_gradient(world: World, name: str, modality: str) -> tuple[float, dict[str, np.ndarray]]:
    method = make_method(MethodConfig(name=name))
    method.begin_step(StepContext(SCENARIO, 1))
    student, old = network(method, 5, 3, 1, modality), network(method, 3, 0, 2, modality)
    teacher = Teacher(old, CPU)
    if method.needs.importance:
        teacher.grow(5, torch.randn(20, DIM, generator=torch.Generator().manual_seed(9)))
    batch = batch_of(world, name)
    config = EngineConfig(zero_stage=1)
    engine = Engine(
        student, build_optimizer(student, OptimConfig()), config=config, rows=len(batch.labels), world=world, device=CPU
    )
    teacher_output = teacher.output(batch, method)
    gathered = gather_batch(batch, engine(batch.visual, batch.audio, None), teacher_output)
    loss = method.loss(gathered.targets, gathered.output, gathered.teacher)["loss"]
    engine.backward(loss)
    gradients = {key: safe_get_full_grad(value).numpy().copy() for key, value in student.named_parameters()}
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("name", "modality"),
    [("lwf", "both"), ("icarl", "both"), ("ssil", "both"), ("afc", "both"), ("afc", "visual"), ("icarl", "audio")],
)
def test_two_ranks_give_the_loss_and_gradient_of_one(name: str, modality: str) -> None:
    [(loss, gradients)] = run_ranks(loss_and_gradient, 1, name, modality)
    assert any(np.abs(gradient).max() > 1e-3 for gradient in gradients.values())
    for rank_loss, rank_gradients in run_ranks(loss_and_gradient, 2, name, modality):
        assert rank_loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
        for key, gradient in gradients.items():
            np.testing.assert_allclose(rank_gradients[key], gradient, rtol=1e-5, atol=1e-6, err_msg=key)
