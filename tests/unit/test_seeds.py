import numpy as np

from avcil_dist.seeds import derive_seed, generator


def test_a_seed_is_the_same_for_ever() -> None:
    assert derive_seed(0, "clips", 1, 2) == 5107830852095604643


def test_seed_purpose_and_parts_all_count() -> None:
    arguments = [(0, "clips", 1, 2), (1, "clips", 1, 2), (0, "shards", 1, 2), (0, "clips", 2, 1), (0, "clips", 12)]
    seeds = {derive_seed(*each) for each in arguments}
    assert len(seeds) == len(arguments)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_starts_anew_each_time() -> None:
    first, second = generator(3, "memory", "dog"), generator(3, "memory", "dog")
    np.testing.assert_array_equal(first.random(5), second.random(5))
