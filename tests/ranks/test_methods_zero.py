"""The baselines at every ZeRO stage: heads of proxies, frozen parts and teachers' gradients included."""

from pathlib import Path

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.streams.artifact import load_artifact
from tests.helpers.ranks import run_ranks
from tests.helpers.streams import run_streams, write_config

METHODS = ("lwf", "icarl", "afc", "memo")
STEPS = [2, 4]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The configuration, and each method's stream on two ranks without ZeRO."""
    folder = tmp_path_factory.mktemp("zero")
    optim = {"epochs": 2, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": 3e-4}
    path = write_config(folder, scenario={"classes_per_step": STEPS}, optim=optim)
    return path, streams(path, 0)


def streams(path: Path, stage: int) -> list[str]:
    words = [f"engine=zero{stage}", f"output={path.parent}/zero{stage}"]
    configs = [load_config(str(path), [f"method={method}", *words]) for method in METHODS]
    return run_ranks(run_streams, 2, configs, range(len(STEPS)))[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_weights_of_stage_0(plain: tuple[Path, list[str]], stage: int) -> None:
    path, expected = plain
    for method, one, other in zip(METHODS, expected, streams(path, stage), strict=True):
        weights, found = (load_artifact(stream, len(STEPS) - 1) for stream in (one, other))
        assert found.memory == weights.memory, method
        assert found.model.keys() == weights.model.keys(), method
        for name, weight in weights.model.items():
            torch.testing.assert_close(found.model[name], weight, rtol=1e-5, atol=1e-5)
