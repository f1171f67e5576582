"""Update rules, schedules and weight averages at every ZeRO stage: the losses of one process without."""

from collections.abc import Mapping

import pytest

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config

SETTINGS = {
    "adamw": {
        "name": "adamw",
        "weight_decay": 0.1,
        "decay": "matrices",
        "head_lr": 1e-3,
        "schedule": "linear",
        "ema": 0.8,
    },
    "sgd": {"name": "sgd", "lr": 0.02, "momentum": 0.5, "schedule": "cosine", "warmup_epochs": 1},
}
RUNS = [(name, stage) for name in SETTINGS for stage in range(4) if not (name == "adamw" and stage == 3)]


class Curve(Observer):
    """Keeps loss and validation accuracy of each epoch."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        self.values.append((values["loss/total"], values["val/accuracy"]))


def curves(world: World, configs: list[Config]) -> list[list[tuple[float, float]]]:
    found = []
    for config in configs:
        curve = Curve()
        step_in_group(config, 0, world=world, observers=[curve], device=CPU, stop=StopRequest())
        found.append(curve.values)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], list[tuple[float, float]]]:
    """By name, ranks and stage: loss and accuracy of each epoch of a step."""
    folder = tmp_path_factory.mktemp("optimizers")
    optim = {"epochs": 4, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": 3e-4}
    path = str(write_config(folder, scenario={"classes_per_step": [3, 3]}, optim=optim))

    def config_of(name: str, ranks: int, stage: int) -> Config:
        words = [f"optim.{key}={value}" for key, value in SETTINGS[name].items()]
        words += [f"engine.zero_stage={stage}", f"output={folder}/{name}-{ranks}-{stage}"]
        return load_config(path, words)

    one, two = [(name, 1, 0) for name in SETTINGS], [(name, 2, stage) for name, stage in RUNS]
    results = {}
    for ranks, keys in ((1, one), (2, two)):
        results |= dict(zip(keys, run_ranks(curves, ranks, [config_of(*key) for key in keys])[0], strict=True))
    return results


@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_the_losses_and_accuracies_are_those_of_one_process(
    found: dict[tuple[str, int, int], list[tuple[float, float]]], name: str, stage: int
) -> None:
    expected, values = found[name, 1, 0], found[name, 2, stage]
    assert [loss for loss, _ in values] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [accuracy for _, accuracy in values] == [accuracy for _, accuracy in expected]
    assert expected[-1][0] < expected[0][0]
