"""An engine built anew from weights and optimizer state goes on as the first would have, to the last bit."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig
from avcil_dist.models.network import Network, build_network
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.weights import to_host, whole_state
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

DIM, ROWS = 384, 4  # DIM squared is more than ZeRO 3 leaves whole
PRECOMPUTED = ModelConfig.model_validate({"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}})
STAGES = (0, 1, 2, 3)


def _student() -> Network:
    torch.manual_seed(0)
    return build_network(PRECOMPUTED, ClipConfig(), {"frames": 2, "positions": 3, "dim": DIM}, 5)


def _engine(world: World, stage: int, student: Network) -> Engine:
    config = EngineConfig(zero_stage=stage)
    return Engine(student, build_optimizer(student, OptimConfig()), config=config, rows=ROWS, world=world, device=CPU)


def _train(engine: Engine, world: World, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(10 * step + world.rank)
        visual, audio = torch.randn(ROWS, 2, 3, DIM, generator=random), torch.randn(ROWS, DIM, generator=random)
        engine.backward(engine(visual, audio).logits.square().mean())
        engine.step()


def _of_all(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parts of both ranks, by rank."""
    by_rank: list[dict[str, Tensor]] = [{}, {}]
    dist.all_gather_object(by_rank, state)
    return by_rank


def _goes_on(world: World) -> dict[int, tuple[bool, bool, dict[str, Tensor]]]:
    """By stage: whether it went on bit-identically, and whether without the state it would not have; the state."""
    results = {}
    for stage in STAGES:
        first = _engine(world, stage, _student())
        _train(first, world, range(2))
        weights, state = whole_state(first.network), to_host(first.optimizer_parts())
        _train(first, world, range(2, 4))
        expected = whole_state(first.network)
        first.close()
        found = []
        for loaded in (True, False):
            student = _student()
            student.load_state_dict(weights)
            second = _engine(world, stage, student)
            if loaded:
                second.load_optimizer(_of_all(state), "here")
            _train(second, world, range(2, 4))
            found.append(all(torch.equal(value, expected[name]) for name, value in whole_state(second.network).items()))
            second.close()
        results[stage] = (found[0], not found[1], state)
    return results


def test_an_engine_goes_on_from_weights_and_optimizer_state() -> None:
    by_rank = run_ranks(_goes_on, 2)
    for stage in STAGES:
        for results in by_rank:
            same, needed, state = results[stage]
            assert same, f"ZeRO {stage}"
            assert needed, f"ZeRO {stage}: the test would pass without the state"
            assert state
    sizes = [sum(value.numel() for value in by_rank[0][stage][2].values()) for stage in STAGES]
    others = [sum(value.numel() for value in by_rank[1][stage][2].values()) for stage in STAGES]
    for mine, theirs in zip(sizes, others, strict=True):  # each rank has half of it, at every stage
        assert mine == pytest.approx(theirs, rel=0.01)
