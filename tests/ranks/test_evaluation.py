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
from avcil_dist.training.evaluation import Predictions, evaluate
from avcil_dist.training.incremental_step import Step
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config


def predict(world: World, config: Config) -> Predictions:
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    torch.manual_seed(0)
    network = build_network(config.model, config.data.clip, manifest.shape, scenario.num_seen(1))
    assert config.optim.global_eval_batch == 16
    step = Step(config, manifest, scenario, 1, make_method(config.method), world, CPU)
    return evaluate(step, network, "test", step.inference())


def test_three_ranks_predict_each_clip_as_one_rank_does(tmp_path: Path) -> None:
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": 4, "val": 2, "test": 10}, separation=0.5)
    config = load_config(str(write_config(tmp_path)))
    [one] = run_ranks(predict, 1, config)
    assert len(one.clips) > 32  # several batches
    assert len(set(one.predictions)) > 1
    for found in run_ranks(predict, 3, config):
        np.testing.assert_array_equal(found.clips, one.clips)
        np.testing.assert_array_equal(found.labels, one.labels)
        np.testing.assert_array_equal(found.predictions, one.predictions)
