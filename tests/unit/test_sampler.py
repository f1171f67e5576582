"""Samplers and requests: the rows of a batch that are read."""

import numpy as np

from avcil_dist.data.sampler import AugmentSeeds, Request

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
