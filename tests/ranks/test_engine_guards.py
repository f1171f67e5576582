"""What goes wrong in engines elsewhere, at every ZeRO stage: heads, frozen and unused parameters, overflow, leaks."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig, MethodConfig
from avcil_dist.data.batch import Batch
from avcil_dist.errors import TrainingError
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.scenario import make_scenario
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.train_step import train_step
from avcil_dist.training.weights import whole_state
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

DIM, ROWS = 384, 4  # DIM squared is more than ZeRO 3 leaves whole
PRECOMPUTED = ModelConfig.model_validate({"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}})
STAGES = (0, 1, 2, 3)


class Found(NamedTuple):
    """What each check found at one stage."""

    replaced_head: str
    frozen: tuple[bool, bool, bool]
    unused: dict[str, Tensor]
    overflow: tuple[list[bool], list[float], bool]
    not_finite: tuple[bool, bool]
    iteration: str
    is_gone: bool


def student() -> HeadedNetwork:
    torch.manual_seed(0)
    made = build_network(PRECOMPUTED, ClipConfig(), {"frames": 2, "positions": 3, "dim": DIM}, 5)
    assert isinstance(made, HeadedNetwork)
    return made


def engine_of(world: World, stage: int, network: HeadedNetwork) -> Engine:
    optim = OptimConfig(lr=1e-2, weight_decay=1e-2)
    return Engine(
        network,
        build_optimizer(network, optim),
        config=EngineConfig(zero_stage=stage),
        rows=ROWS,
        world=world,
        device=CPU,
    )


def batch_of(world: World, number: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(10 * number + world.rank)
    return torch.randn(ROWS, 2, 3, DIM, generator=random), torch.randn(ROWS, DIM, generator=random)


def loss_of(engine: Engine, world: World, number: int = 0) -> Tensor:
    return engine(*batch_of(world, number)).logits.square().mean()


def a_replaced_head(world: World, stage: int) -> str:
    engine = engine_of(world, stage, student())
    engine.network.classifier = nn.Linear(DIM, 7)
    try:
        engine.weight_parts()
    except AssertionError as error:
        return str(error)
    finally:
        engine.close()
    return "was not noticed"


def frozen_parameters(world: World, stage: int) -> tuple[bool, bool, bool]:
    """Whether the frozen are as they were, the others have moved, and all are in the state."""
    network = student()
    network.attention.requires_grad_(False)
    network.register_buffer("counter", torch.arange(3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    engine = engine_of(world, stage, network)
    engine.backward(loss_of(engine, world))
    engine.step()
    after = whole_state(engine.network)
    engine.close()
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith(("attention.", "counter"))}
    return frozen <= same, not (set(before) - frozen) & same, after.keys() == before.keys()


def unused_parameters(world: World, stage: int) -> dict[str, Tensor]:
    """Weights after steps in which one parameter is never used, and one in every other step."""
    network, uses = student(), [True]
    proj: Any = network.audio_proj
    for name in ("never", "sometimes"):
        proj.register_parameter(name, nn.Parameter(torch.ones(DIM, DIM)))
    plain: Callable[[Tensor], Tensor] = proj.forward
    proj.forward = lambda rows: plain(rows) + (proj.sometimes[0] if uses[0] else 0)
    engine = engine_of(world, stage, network)
    for number in range(4):
        uses[0] = number % 2 == 0
        engine.backward(loss_of(engine, world, number))
        engine.step()
    state = whole_state(engine.network)
    engine.close()
    return {name: value for name, value in state.items() if name.startswith("audio_proj.")}


def an_overflow(world: World, stage: int) -> tuple[list[bool], list[float], bool]:
    """Which steps were taken from a scale that is too large, the scales, and whether weights moved only in those."""
    network = student()
    network.precision = "fp16"
    engine = engine_of(world, stage, network)
    scale = {"loss_scale/value/0": 2.0**40, "loss_scale/num_good/0": 7.0}
    engine.load_optimizer([{key: torch.tensor([value]) for key, value in scale.items()}], "here")
    taken, scales, as_told = [], [], True
    for _ in range(30):
        before = whole_state(engine.network)
        engine.backward(loss_of(engine, world))
        taken.append(engine.step())
        after = whole_state(engine.network)
        as_told &= any(not torch.equal(after[name], before[name]) for name in before) == taken[-1]
        scales.append(float(engine.optimizer_parts()["loss_scale/value/0"]))
    engine.close()
    return taken, scales, as_told


def a_gradient_that_is_not_finite(world: World, stage: int) -> tuple[bool, bool]:
    """Whether the step was taken, and whether weights moved."""
    engine = engine_of(world, stage, student())
    before = whole_state(engine.network)
    engine.backward((engine(*batch_of(world, 0)).logits.sum() * 0).sqrt())
    taken = engine.step()
    moved = any(not torch.equal(value, before[name]) for name, value in whole_state(engine.network).items())
    engine.close()
    return taken, moved


def an_iteration_whose_gradient_is_not_finite(world: World, stage: int) -> str:
    """What is said of it."""
    network = student()
    network.classifier.weight.register_hook(lambda gradient: gradient * torch.inf)
    engine = engine_of(world, stage, network)
    method = make_method(MethodConfig(name="finetune"))
    method.begin_step(StepContext(make_scenario(list("abcde"), classes_per_step=[5]), 0))
    labels, valid = torch.arange(ROWS), torch.ones(ROWS, dtype=torch.bool)
    batch = Batch(*batch_of(world, 0), labels, valid, ROWS, clips=labels.numpy())
    try:
        train_step(engine, batch, method=method, teacher=None)
    except TrainingError as error:
        return str(error)
    finally:
        engine.close()
    return "was not noticed"


def a_closed_engine(world: World, stage: int) -> bool:
    network = student()
    engine = engine_of(world, stage, network)
    engine.backward(loss_of(engine, world))
    engine.step()
    whole_state(engine.network)
    alive = weakref.ref(network)
    engine.close()
    del network, engine
    gc.collect()
    return alive() is None


def check_all(world: World) -> dict[int, Found]:
    return {
        stage: Found(
            a_replaced_head(world, stage),
            frozen_parameters(world, stage),
            unused_parameters(world, stage),
            an_overflow(world, stage),
            a_gradient_that_is_not_finite(world, stage),
            an_iteration_whose_gradient_is_not_finite(world, stage) if stage else "",
            a_closed_engine(world, stage),
        )
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def found() -> list[dict[int, Found]]:
    """By rank and stage."""
    return run_ranks(check_all, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_head_put_in_after_the_engine_was_built_is_noticed(found: list[dict[int, Found]], stage: int) -> None:
    for results in found:
        assert results[stage].replaced_head == "not in the optimizer: classifier.weight, classifier.bias"


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_and_buffers_stay_and_are_in_the_state(found: list[dict[int, Found]], stage: int) -> None:
    for results in found:
        assert results[stage].frozen == (True, True, True)


@pytest.mark.parametrize("stage", STAGES)
def test_unused_parameters_train_alike_at_every_stage(found: list[dict[int, Found]], stage: int) -> None:
    for results in found:
        for name, weight in found[0][0].unused.items():
            torch.testing.assert_close(results[stage].unused[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_in_fp16_takes_no_step_and_halves_the_scale_on_all_ranks(
    found: list[dict[int, Found]], stage: int
) -> None:
    taken, scales, as_told = found[0][stage].overflow
    assert found[1][stage].overflow == (taken, scales, as_told)
    assert as_told
    assert taken[:3] == [False] * 3
    assert sum(taken) > 1
    assert scales == [2.0**40 / 2 ** taken[: count + 1].count(False) for count in range(len(taken))]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_gradient_that_is_not_finite_takes_no_step(found: list[dict[int, Found]], stage: int) -> None:
    for results in found:
        assert results[stage].not_finite == (False, False)
        assert results[stage].iteration.startswith("the gradient is not finite, the loss is; ")


@pytest.mark.parametrize("stage", STAGES)
def test_a_closed_engine_leaves_nothing_behind(found: list[dict[int, Found]], stage: int) -> None:
    for results in found:
        assert results[stage].is_gone
