"""Sections of DeepSpeed's configuration that only a GPU's memory would show."""

import pytest

from avcil_dist.config.schema import EngineConfig
from avcil_dist.training.engine import zero_section

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
