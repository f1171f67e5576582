"""Incremental steps at every ZeRO stage, in float32 and bf16: losses, weights and artifacts of one process without."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ArtifactError
from avcil_dist.methods import make_method
from avcil_dist.models.state_dict import load_whole_state
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.stream import scenario_of, stream_url
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.build import network_after
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import step_in_group
from avcil_dist.training.weights import whole_state
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config

STAGES, PRECISIONS = (0, 1, 2, 3), ("float32", "bf16")
LR = 3e-4
Key = tuple[int, str]


class Curve(Observer):
    """Keeps the mean loss of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        self.losses.append(values["loss/total"])


class Streams(NamedTuple):
    """The losses of two steps, of one process at ZeRO 0 and of two at each stage; and the configurations."""

    one: dict[Key, list[float]]
    two: dict[Key, list[float]]
    configs: dict[tuple[int, int, str], Config]


def losses(world: World, configs: Mapping[Key, Config], steps: range) -> dict[Key, list[float]]:
    found = {}
    for key, config in configs.items():
        curve = Curve()
        for step in steps:
            step_in_group(config, step, world=world, observers=[curve], device=CPU, stop=StopRequest())
        found[key] = curve.losses
    return found


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Streams:
    folder = tmp_path_factory.mktemp("zero_steps")
    optim = {"epochs": 3, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": LR}
    path = write_config(folder, scenario={"classes_per_step": [3, 3]}, optim=optim)

    def config_of(count: int, stage: int, precision: str) -> Config:
        words = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "engine.micro_batch=3"]
        return load_config(
            str(path), [*words[: 3 if count == 2 else 2], f"output={folder}/{count}-{stage}-{precision}"]
        )

    one = {(0, precision): config_of(1, 0, precision) for precision in PRECISIONS}
    two = {(stage, precision): config_of(2, stage, precision) for stage in STAGES for precision in PRECISIONS}
    configs = {(1, *key): config for key, config in one.items()} | {(2, *key): config for key, config in two.items()}
    return Streams(run_ranks(losses, 1, one, range(2))[0], run_ranks(losses, 2, two, range(2))[0], configs)


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_curve_is_that_of_one_process(streams: Streams, stage: int) -> None:
    exact = streams.one[0, "float32"]
    assert len(exact) == 6
    assert streams.two[stage, "float32"] == pytest.approx(exact, rel=1e-5)
    # bf16 keeps 8 bits of a number: single losses are off by up to a percent, whatever the stage.
    assert streams.two[stage, "bf16"] == pytest.approx(exact, rel=0.01)
    assert streams.two[stage, "bf16"] == pytest.approx(streams.one[0, "bf16"], rel=0.002)
    assert streams.two[stage, "bf16"] != pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_artifact_is_whole_in_one_process(streams: Streams, stage: int, precision: str) -> None:
    config = streams.configs[2, stage, precision]
    artifact = load_artifact(stream_url(config), 1)
    manifest = load_manifest(config.data.manifest)
    network = network_after(config, manifest.shape, scenario_of(config, manifest), make_method(config.method), 1)
    load_whole_state(network, artifact.model, "the artifact")
    state = whole_state(network)
    assert state.keys() == artifact.model.keys()
    assert all(torch.equal(state[name], weight) for name, weight in artifact.model.items())
    assert all(weight.dtype == torch.float32 for weight in artifact.model.values())
    expected = load_artifact(stream_url(streams.configs[1, 0, precision]), 1)
    for name, weight in expected.model.items():
        tolerance = (
            1e-5 if precision == "float32" else 10 * LR
        )  # Adam makes whole steps of the signs of small gradients
        torch.testing.assert_close(artifact.model[name], weight, rtol=1e-4, atol=tolerance, msg=name)


def test_one_process_without_zero_goes_on_from_the_artifact_of_two_at_zero_3(streams: Streams) -> None:
    config = streams.configs[2, 3, "float32"].model_copy(update={"engine": streams.configs[1, 0, "float32"].engine})
    [found] = run_ranks(losses, 1, {(0, "float32"): config}, range(1, 2))
    assert found[0, "float32"] == pytest.approx(streams.one[0, "float32"][3:], rel=1e-5)


def test_weights_that_are_not_the_networks_are_named(streams: Streams, tmp_path: Path) -> None:
    config = streams.configs[1, 0, "float32"]
    manifest = load_manifest(config.data.manifest)
    network = network_after(config, manifest.shape, scenario_of(config, manifest), make_method(config.method), 0)
    weights = whole_state(network)
    changed = {name: value for name, value in weights.items() if name != "audio_proj.bias"} | {"extra": torch.zeros(1)}
    changed["classifier.bias"] = torch.zeros(7)
    said = r"here: .*1 missing \(audio_proj.bias\); 1 unexpected \(extra\); 1 of another shape \(classifier.bias\)"
    with pytest.raises(ArtifactError, match=said):
        load_whole_state(network, changed, "here")
