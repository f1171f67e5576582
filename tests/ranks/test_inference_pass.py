"""Inference pass, herding, class means, k-means and statistics are the same on any number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import DataError
from avcil_dist.methods import make_method
from avcil_dist.methods.analytic import Analytic
from avcil_dist.methods.base import StepContext
from avcil_dist.methods.nearest_mean import class_means
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.closed_form import train_closed_form
from avcil_dist.training.exemplars import exemplar_features, update_memory
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.features import damage
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config

CLIPS = 150  # clips of a class: more than a pass has in a batch, and no multiple of it


@pytest.fixture
def config(tmp_path: Path) -> Config:
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": CLIPS, "val": 6, "test": 10}, separation=0.5)
    return load_config(str(write_config(tmp_path)), ["memory.size=90"])


def prepare(world: World, config: Config) -> tuple[InferencePass, HeadedNetwork, StepContext]:
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    torch.manual_seed(0)
    network = build_network(config.model, config.data.clip, manifest.shape, 5)
    assert isinstance(network, HeadedNetwork)
    return InferencePass(manifest, scenario, config.data, world, CPU), network, StepContext(scenario, 1)


def features_of_classes(world: World, config: Config) -> dict[str, Any]:
    features, network, _ = prepare(world, config)
    names = ["class_004", "class_001"]
    found = features.class_features(network, {name: features.manifest.clips([name], "train") for name in names})
    return {name: (of_class.clips, of_class.features.numpy()) for name, of_class in found.items()}


def test_features_are_bit_for_bit_those_of_one_rank_in_the_requested_order(config: Config) -> None:
    manifest = load_manifest(config.data.manifest)
    [one] = run_ranks(features_of_classes, 1, config)
    assert list(one) == ["class_004", "class_001"]
    for found in run_ranks(features_of_classes, 2, config):
        for name, (clips, features) in one.items():
            assert np.array_equal(clips, manifest.clips([name], "train"))
            assert features.shape == (CLIPS, 16)
            assert np.array_equal(found[name][0], clips)
            assert np.array_equal(found[name][1], features)


def test_features_are_the_input_of_the_head(config: Config) -> None:
    [found] = run_ranks(features_of_classes, 1, config)
    [heads] = run_ranks(logits_of_features, 1, config, found)
    assert heads < 1e-5


def logits_of_features(world: World, config: Config, found: dict[str, Any]) -> float:
    features, network, _ = prepare(world, config)
    clips, rows = found["class_001"]
    worst = 0.0
    first = 0
    for batch, output in features.run(network, clips):
        count = int(batch.valid.sum())
        expected = network.classifier(torch.from_numpy(rows[first : first + count]))
        worst = max(worst, float((output.logits[batch.valid] - expected).abs().max()))
        first += count
    assert first == CLIPS
    return worst


def herded(world: World, config: Config) -> tuple[dict[str, tuple[str, ...]], np.ndarray, list[np.ndarray]]:
    """The memory after step 1, the means of its exemplars, and proxies of the new classes."""
    features, network, context = prepare(world, config)
    method = make_method(config.method.model_copy(update={"name": "afc"}))
    memory = EMPTY_MEMORY
    for number in (0, 1):
        step = Step(config, features.manifest, context.scenario, number, method, world, CPU)
        memory = update_memory(step, memory, network, features)
    means = class_means(exemplar_features(step, memory, network, features))
    names = context.scenario.new(1)
    new = features.class_features(network, {name: features.manifest.clips([name], "train") for name in names})
    proxies = method.imprint([new[name].features for name in names], 2.0)
    return dict(memory.keys), means.numpy(), proxies.numpy()


def test_herding_means_and_proxies_do_not_depend_on_the_ranks(config: Config) -> None:
    config = config.model_copy(update={"method": config.method.model_validate({"name": "afc"})})
    [(keys, means, proxies)] = run_ranks(herded, 1, config)
    assert {name: len(found) for name, found in keys.items()} == {f"class_{n:03d}": 18 for n in range(5)}
    np.testing.assert_allclose(np.linalg.norm(proxies, axis=1), 2.0, rtol=1e-5)
    for other_keys, other_means, other_proxies in run_ranks(herded, 2, config):
        assert other_keys == keys
        np.testing.assert_allclose(other_means, means, rtol=0, atol=1e-6)
        np.testing.assert_allclose(other_proxies, proxies, rtol=0, atol=1e-6)


def test_a_damaged_clip_is_left_out_of_herding_and_features(config: Config) -> None:
    damage(Path(config.data.manifest).parent, "train-004-00007")
    for ranks in (1, 2):
        found = run_ranks(features_of_classes, ranks, config)[-1]
        assert len(found["class_004"][0]) == len(found["class_004"][1]) == CLIPS - 1
        assert len(found["class_001"][0]) == CLIPS


def fails_on_damage(world: World, config: Config) -> str:
    try:
        features_of_classes(world, config)
    except DataError as error:
        return str(error)
    return ""


def test_too_many_damaged_clips_are_an_error_on_all_ranks(config: Config) -> None:
    for row in range(5):
        damage(Path(config.data.manifest).parent, f"train-004-{row:05d}")
    first, second = run_ranks(fails_on_damage, 2, config)
    assert first == second
    assert first.startswith("5 of 300 clips are damaged, data.max_bad_fraction allows 3; the first: train-004-0000")


def summed(world: World, config: Config) -> tuple[float, np.ndarray, np.ndarray]:
    """γ, W and the Gram matrix after steps 0 and 1."""
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    state: dict[str, Any] = {}
    for step in (0, 1):
        method = make_method(config.method)
        assert isinstance(method, Analytic)
        method.load_state_dict(state)
        method.begin_step(StepContext(scenario, step))
        network = build_network(
            config.model, config.data.clip, manifest.shape, 1, network_spec=method.needs.network_spec
        )
        value = Step(config, manifest, scenario, step, method, world, CPU)
        train_closed_form(value, network, value.inference())
        state = method.state_dict()
    return state["gamma"], state["weights"].numpy(), state["gram_000"].numpy()


def test_the_sums_and_the_classifier_do_not_depend_on_the_ranks(config: Config) -> None:
    config = config.model_copy(update={"method": config.method.model_validate({"name": "analytic"})})
    [(gamma, weights, gram)] = run_ranks(summed, 1, config)
    assert gram[-1, -1] == 5 * CLIPS  # the constant's square, once a clip
    for other_gamma, other_weights, other_gram in run_ranks(summed, 2, config):
        assert other_gamma == gamma
        np.testing.assert_allclose(other_gram, gram, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(other_weights, weights, rtol=0, atol=1e-8)
