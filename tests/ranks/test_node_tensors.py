"""Tensors once in the memory of a node: the ranks see the same bytes, and a rank that cannot share has its own."""

import resource
from typing import Any

import torch
from torch import Tensor

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ArtifactError
from avcil_dist.models.network import Network, build_network
from avcil_dist.training.collectives import gather_json
from avcil_dist.training.engine import shard_out
from avcil_dist.training.node_tensors import load_on_node
from avcil_dist.training.weights import gather_whole, to_host, weight_parts, whole_forms, whole_state
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "none": torch.zeros(0, 4)}
PRECOMPUTED = ModelConfig.model_validate({"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}})


def network() -> Network:
    torch.manual_seed(0)
    made = build_network(PRECOMPUTED, ClipConfig(), {"frames": 2, "positions": 3, "dim": 384}, 5)
    made.register_buffer("counter", torch.arange(3))
    return made


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def is_shared(world: World, tensors: dict[str, Tensor]) -> bool:
    """Whether this rank sees what rank 0 writes."""
    gather_json(None)
    if world.is_main:
        tensors["a"][0, 0] = 99
    gather_json(None)
    return bool(tensors["a"][0, 0] == 99)


def checks(world: World) -> dict[str, Any]:
    """What this rank finds, by check."""
    calls: list[int] = []

    def load() -> dict[str, Tensor]:
        calls.append(world.rank)
        return {name: value.clone() for name, value in WEIGHTS.items()}

    def fail() -> dict[str, Tensor]:
        raise ArtifactError("model.safetensors: damaged")

    found: dict[str, Any] = {}
    loaded = load_on_node(load, world)
    found["loaded"] = same(loaded, WEIGHTS), is_shared(world, loaded), len(calls)
    try:
        load_on_node(fail, world)
    except ArtifactError as error:
        found["error"] = str(error)

    one = network()
    expected, forms = whole_state(one), whole_forms(one)
    parts = to_host(weight_parts(one, world))
    found["parts"] = sum(value.numel() for value in parts.values())
    found["whole"] = same(gather_whole(parts, forms, CPU, world), expected)
    engine = shard_out(one, world)
    found["of ZeRO 3"] = same(gather_whole(to_host(weight_parts(one, world)), forms, CPU, world), expected)
    engine.destroy()

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
    calls.clear()
    alone = load_on_node(load, world)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    found["alone"] = same(alone, WEIGHTS), is_shared(world, alone), len(calls)
    return found


def test_ranks_share_tensors_where_they_can() -> None:
    first, second = run_ranks(checks, 2)
    assert first["loaded"] == (True, True, 1)
    assert second["loaded"] == (True, True, 0)
    assert first["error"] == second["error"] == "model.safetensors: damaged"
    assert first["whole"] == second["whole"] == first["of ZeRO 3"] == second["of ZeRO 3"] is True
    assert abs(first["parts"] - 3 - second["parts"]) <= 1  # the buffer is of rank 0
    assert first["alone"] == (True, True, 1)
    assert second["alone"] == (True, False, 1)
