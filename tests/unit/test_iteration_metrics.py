"""Metrics of single iterations: their interval, and that they change no bit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.streams.stream import stream_url
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from tests.helpers.streams import weights_digest, write_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]  # DeepSpeed starts a compiler as it is imported


class Iterations(Observer):
    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        self.values[iteration] = dict(values)


def train(config: Config) -> dict[int, dict[str, float]]:
    observer, device = Iterations(), torch.device("cpu")
    step_in_group(config, 0, world=World(), observers=[observer], device=device, stop=StopRequest())
    return observer.values


def test_iterations_are_reported_at_their_interval_and_change_no_bit(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    words = ["scenario.classes_per_step=3", "optim.epochs=2", "memory.size=12"]  # 6 iterations an epoch
    often, seldom = (
        load_config(path, [*words, f"output={tmp_path}/{every}", f"tracking.every={every}"]) for every in (2, 9)
    )
    found, ends = train(often), train(seldom)
    assert (list(found), list(ends)) == ([2, 4, 6, 8, 10, 12], [6, 9, 12])
    assert weights_digest(stream_url(often), 0) == weights_digest(stream_url(seldom), 0)
    for name in ("loss/total", "optim/gradient_norm", "optim/learning_rate"):
        assert found[6][name] == ends[6][name] > 0  # of that iteration alone
    assert set(found[2]) >= {"speed/clips_per_second", "speed/tflop_per_second", "speed/data_wait_share"}
    assert 0 < found[12]["speed/share_of_peak"] < 2
    assert found[12]["memory/peak_gb"] > 0.1
