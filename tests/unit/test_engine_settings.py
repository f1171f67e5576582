"""Sections of DeepSpeed's configuration that only a GPU's memory would show."""

import os

import pytest
import torch

from avcil_dist.config.schema import EngineConfig
from avcil_dist.training.engine import zero_section
from avcil_dist.training.rank_environment import set_deepspeed_variables
from avcil_dist.world import World

HOST = {"device": "cpu"}


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ("none", {}),
        ("optimizer", {"offload_optimizer": HOST}),
        ("parameters", {"offload_optimizer": HOST, "offload_param": HOST}),
    ],
)
def test_state_is_kept_in_host_memory_as_the_setting_says(offload: str, expected: dict[str, object]) -> None:
    section = zero_section(EngineConfig.model_validate({"zero_stage": 3, "offload": offload}))
    assert section["stage"] == 3
    assert {name: value for name, value in section.items() if name.startswith("offload")} == expected


@pytest.mark.parametrize(("device", "number"), [("cuda:0", 0), ("cuda:3", 3), ("cpu", 3)])
def test_a_rank_has_the_number_of_its_gpu_and_not_its_own_where_it_sees_only_one(
    monkeypatch: pytest.MonkeyPatch, device: str, number: int
) -> None:
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "7")
    set_deepspeed_variables(World(7, 8, 3, 4, launcher="slurm"), torch.device(device))
    assert os.environ["LOCAL_RANK"] == str(number)
    assert "OMPI_COMM_WORLD_RANK" not in os.environ
