"""Evaluation by a number of ranks that does not divide the batch."""

from pathlib import Path

import numpy as np
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.methods import make_method
from avcil_dist.models.network import build_network
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.evaluation import DAMAGED, ScoredPredictions, evaluate, evaluate_scores
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.observer import Observer
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.features import damage
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config


class Batches(Observer):
    """Counts of the batches that the test begins with, and of those that are done."""

    total = done = 0

    def begin_test(self, num_batches: int) -> None:
        self.total = num_batches

    def advance(self) -> None:
        self.done += 1


def predict(world: World, config: Config) -> tuple[ScoredPredictions, int]:
    """Predict the test clips; return also the number of batches that were reported."""
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    torch.manual_seed(0)
    network = build_network(config.model, config.data.clip, manifest.shape, scenario.num_seen(1))
    assert config.optim.global_eval_batch == 16
    step = Step(config, manifest, scenario, 1, make_method(config.method), world, CPU)
    batches = Batches()
    predictions = evaluate(step, network, "test", step.inference())
    scored = evaluate_scores(step, network, "test", step.inference(), batches)
    np.testing.assert_array_equal(scored.predictions, predictions.predictions)
    assert batches.done == batches.total
    return scored, batches.total


def test_three_ranks_predict_each_clip_as_one_rank_does(tmp_path: Path) -> None:
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": 4, "val": 2, "test": 10}, separation=0.5)
    damage(tmp_path / "shards", "test-001-00003")
    config = load_config(str(write_config(tmp_path)), ["data.max_bad_fraction=0.1"])
    [(one, num_batches)] = run_ranks(predict, 1, config)
    assert len(one.clips) > 32  # several batches
    assert num_batches == -(-len(one.clips) // 16)
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    np.testing.assert_array_equal(one.clips, manifest.clips(scenario.seen(1), "test"))
    assert [scenario.classes[label] for label in one.labels] == [manifest.class_of(clip) for clip in one.clips]
    assert len(set(one.predictions)) > 2
    assert one.accuracy == sum(one.labels == one.predictions) / len(one.clips)
    [damaged] = np.flatnonzero(~np.isin(one.predictions, one.labels))  # no label, so it counts as wrong for any class
    assert one.predictions[damaged] == DAMAGED
    assert one.scores.shape == (len(one.clips), scenario.num_seen(1))
    np.testing.assert_array_equal(np.isnan(one.scores).all(axis=1), one.predictions == DAMAGED)
    good = one.predictions != DAMAGED
    np.testing.assert_array_equal(one.scores[good].argmax(axis=1), one.predictions[good])
    for found, reported in run_ranks(predict, 3, config):
        assert reported > 1
        np.testing.assert_array_equal(found.clips, one.clips)
        np.testing.assert_array_equal(found.labels, one.labels)
        np.testing.assert_array_equal(found.predictions, one.predictions)
        np.testing.assert_allclose(found.scores, one.scores, atol=1e-5)
