"""Frozen, trained and adapted encoders under DeepSpeed: every ZeRO stage updates them as plain torch does."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig
from avcil_dist.models.network import Network, build_network
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer, parameter_groups
from avcil_dist.training.weights import to_host, whole_state
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

CLIP = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
TINY = {"weights": "random", "dim": 24, "depth": 3, "heads": 2}
FROZEN, PARTIAL, FULL = {"train": "frozen"}, {"train": "partial", "last_blocks": 1}, {"train": "full"}
ADAPTERS = {"train": "adapters", "adapter_rank": 4}
PAIRS = {"partial and full": (PARTIAL, FULL), "frozen and adapters": (FROZEN, ADAPTERS)}
OPTIM = OptimConfig(lr=1e-3, layer_decay=0.5)
STAGES = (0, 1, 2, 3)


class Found(NamedTuple):
    """Weights of the engine, and whether an engine rebuilt from weights and optimizer state ends in the same bits."""

    weights: dict[str, Tensor]
    continues: bool


def make_network(pair: str) -> Network:
    visual, audio = PAIRS[pair]
    config = {"visual": {"kind": "videomae", **TINY, **visual}, "audio": {"kind": "audiomae", **TINY, **audio}}
    torch.manual_seed(0)
    return build_network(ModelConfig.model_validate(config), CLIP, {}, num_classes=3)


def clips(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(3, 4, 3, 32, 32, generator=random), torch.randn(3, 64, 32, generator=random)


def in_plain_torch(pair: str) -> dict[str, Tensor]:
    network = make_network(pair).train()
    optimizer = torch.optim.Adam(parameter_groups(network, OPTIM), weight_decay=OPTIM.weight_decay)
    for step in range(3):
        optimizer.zero_grad()
        network(*clips(step)).logits.square().mean().backward()
        optimizer.step()
    return whole_state(network)


def of_all_ranks(parts: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parts of both ranks, by rank."""
    by_rank: list[dict[str, Tensor]] = [{}, {}]
    dist.all_gather_object(by_rank, parts)
    return by_rank


def with_deepspeed(world: World) -> dict[tuple[int, str], Found]:
    """Every rank sees the same clips, so that the mean over ranks is the gradient of one."""

    def engine_on(network: Network, stage: int) -> Engine:
        config = EngineConfig(zero_stage=stage)
        return Engine(network.train(), build_optimizer(network, OPTIM), config=config, rows=3, world=world, device=CPU)

    def train(engine: Engine, steps: range) -> None:
        for step in steps:
            engine.backward(engine(*clips(step)).logits.square().mean())
            engine.step()

    found = {}
    for stage in STAGES:
        for pair in PAIRS:
            first = engine_on(make_network(pair), stage)
            train(first, range(2))
            weights, state = whole_state(first.network), of_all_ranks(to_host(first.optimizer_parts()))
            train(first, range(2, 3))
            expected = whole_state(first.network)
            first.close()
            network = make_network(pair)
            network.load_state_dict(weights)
            second = engine_on(network, stage)
            second.load_optimizer(state, "here")
            train(second, range(2, 3))
            same = all(torch.equal(value, expected[name]) for name, value in whole_state(second.network).items())
            second.close()
            found[stage, pair] = Found(expected, same)
    return found


def test_every_zero_stage_updates_exactly_the_trained_parameters_as_plain_torch_does() -> None:
    found = run_ranks(with_deepspeed, 2)[0]
    for pair in PAIRS:
        network, expected = make_network(pair), in_plain_torch(pair)
        before = whole_state(network)
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert 0 < len(trained) < len(before)
        for stage in STAGES:
            weights, continues = found[stage, pair]
            moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
            assert moved == trained, f"ZeRO {stage}, {pair}"
            for name in trained:
                torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-5)
            assert continues, f"ZeRO {stage}, {pair}"
