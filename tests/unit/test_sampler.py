"""Samplers and requests: the rows of a batch that are read."""

from pathlib import Path

import numpy as np
import pytest

from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.plan import NO_CLIPS, plan_epoch, rank_share
from avcil_dist.data.sampler import AugmentSeeds, Request, TrainingSampler
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards

CLIPS = np.array([3, 8, 1, 7, 5])


def test_a_request_without_cached_rows_reads_all() -> None:
    request = Request(CLIPS, 3)
    assert request.to_read is request
    assert request.stored_clips is CLIPS


def test_the_missing_rows_keep_their_order_seeds_and_copies() -> None:
    seeds = AugmentSeeds(9, np.array([0, 1, 2, 3, 4]))
    missing = np.array([True, False, True, False, True])
    request = Request(CLIPS, 3, seeds, copies=CLIPS + 100, missing=missing)
    part = request.to_read
    assert part.clips.tolist() == [3, 1, 5]
    assert part.stored_clips.tolist() == [103, 101, 105]
    assert part.num_current == 2  # of the three current rows
    assert part.missing is None
    assert part.augment_seeds is not None
    for row, original in enumerate((0, 2, 4)):
        assert part.augment_seeds.seed_of(row, "key") == seeds.seed_of(original, "key")


def test_a_seed_of_augmentation_depends_on_seed_epoch_and_clip() -> None:
    seeds = AugmentSeeds(9, np.array([0, 1, 0]))
    assert seeds.seed_of(0, "a") == seeds.seed_of(2, "a")
    others = {
        seeds.seed_of(0, "a"),
        seeds.seed_of(1, "a"),
        seeds.seed_of(0, "b"),
        AugmentSeeds(8, seeds.epochs).seed_of(0, "a"),
    }
    assert len(others) == 4


def test_the_clips_of_each_class_in_a_mean_batch_are_those_of_the_plan(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path, classes=4, clips={"train": 24}))
    labels = {name: number for number, name in enumerate(manifest.classes)}
    old = [manifest.clips([name], "train") for name in manifest.classes[:2]]
    sampler = TrainingSampler(
        manifest=manifest,
        classes=manifest.classes[2:],
        exemplars=np.concatenate([old[0][:6], old[1][:2]]),
        data=DataConfig(manifest="unused"),
        optim=OptimConfig(global_batch=12, global_replay_batch=8, epochs=2),
        seed=0,
        step=1,
        world=World(rank=0, size=1, local_rank=0, local_size=1),
    )
    batches = [request.clips for request in sampler]
    found = np.bincount(manifest.shard_labels(labels)[manifest.shards_of(np.concatenate(batches))]) / len(batches)
    np.testing.assert_allclose(sampler.expected_counts(labels, 4), found)
    assert found.tolist() == [6, 2, 6, 6]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 12])
def test_the_batches_of_a_rank_are_planned_without_those_of_others(tmp_path: Path, ranks: int) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path, classes=3, clips={"train": 43}, clips_per_shard=9))
    classes = manifest.classes[1:]
    late = manifest.clips(["class_000"], "train")[[12, 0, 5]]
    plan = {"global_batch": 12, "canonical_nodes": 3}
    whole = plan_epoch(manifest, classes, seed=3, step=1, epoch=2, window=2, exemplars=late, **plan)
    for rank in range(ranks):
        sampler = TrainingSampler(
            manifest=manifest,
            classes=classes,
            exemplars=NO_CLIPS,
            joined=late,
            data=DataConfig(manifest="unused", canonical_nodes=3, shuffle_window=2),
            optim=OptimConfig(global_batch=12, epochs=3),
            seed=3,
            step=1,
            world=World(rank=rank, size=ranks, local_rank=0, local_size=1),
            start=2 * len(whole.batches) + 4,
        )
        assert sampler.batches_per_epoch == len(whole.batches)
        own = rank_share(whole.batches, rank, ranks)
        np.testing.assert_array_equal(sampler.epoch_batches(2), own)
        np.testing.assert_array_equal([request.clips for request in sampler], own[4:])
