import json

import numpy as np
import pytest

from avcil_dist.data.exemplar_memory import (
    EMPTY_MEMORY,
    ExemplarMemory,
    herding_order,
    quota,
    random_order,
    unit_rows,
)


def keys_of(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


def test_every_class_gets_an_equal_quota_of_its_first() -> None:
    memory = EMPTY_MEMORY.update({name: keys_of(name, 20) for name in "abc"}, size=10)
    assert memory.keys == {name: tuple(keys_of(name, 3)) for name in "abc"}
    assert memory.count == 9


@pytest.mark.parametrize(("size", "classes", "each"), [(11, 3, 3), (1500, 309, 4), (2, 3, 0), (12, 3, 4), (0, 5, 0)])
def test_the_quota_is_rounded_down_and_the_memory_never_exceeds_its_size(size: int, classes: int, each: int) -> None:
    assert quota(size, classes) == each
    names = [f"c{number}" for number in range(classes)]
    memory = EMPTY_MEMORY.update({name: keys_of(name, 9) for name in names}, size)
    assert memory.count == each * classes <= size
    half = classes // 2
    grown = EMPTY_MEMORY.update({name: keys_of(name, 9) for name in names[:half]}, size) if half else EMPTY_MEMORY
    assert grown.update({name: keys_of(name, 9) for name in names[half:]}, size).keys.keys() == memory.keys.keys()
    assert grown.update({name: keys_of(name, 9) for name in names[half:]}, size).count <= size


def test_old_classes_keep_their_first_exemplars() -> None:
    before = EMPTY_MEMORY.update({"a": keys_of("a", 20), "b": keys_of("b", 20)}, size=12)
    after = before.update({"c": keys_of("c", 20)}, size=12)
    assert after.keys["a"] == before.keys["a"][:4]
    assert after.keys["b"] == before.keys["b"][:4]
    assert list(after.keys) == ["a", "b", "c"]  # in their order of arrival
    assert len(after.keys["c"]) == 4


def test_a_class_with_fewer_clips_than_the_quota_gives_what_it_has() -> None:
    memory = EMPTY_MEMORY.update({"a": keys_of("a", 2), "b": keys_of("b", 20), "c": keys_of("c", 1)}, size=15)
    assert {name: len(keys) for name, keys in memory.keys.items()} == {"a": 2, "b": 5, "c": 1}


def test_a_memory_larger_than_the_data_holds_all_of_it() -> None:
    memory = EMPTY_MEMORY.update({"a": keys_of("a", 5)}, size=1000)
    assert memory.keys == {"a": tuple(keys_of("a", 5))}


def test_a_random_order_follows_the_seed_and_the_class_and_holds_every_key_once() -> None:
    clips = np.arange(100, 150)
    order = random_order("a", clips, seed=0).tolist()
    assert sorted(order) == clips.tolist() != order
    assert order == random_order("a", clips, seed=0).tolist()
    assert order != random_order("a", clips, seed=1).tolist()
    assert order != random_order("b", clips, seed=0).tolist()


def test_a_random_order_stays_the_same_in_every_version() -> None:
    assert random_order("a", np.arange(6), seed=3).tolist() == [3, 1, 0, 5, 4, 2]


def test_a_memory_of_size_zero_knows_its_classes_and_holds_nothing() -> None:
    memory = EMPTY_MEMORY.update({"a": keys_of("a", 5)}, size=0)
    assert memory.keys == {"a": ()}
    assert memory.count == 0


def test_herding_follows_the_mean_step_by_step() -> None:
    # Angles around a mean of 0°: the middle one first, then pairs that balance each other.
    angles = np.radians([-40.0, -10.0, 1.0, 12.0, 37.0])
    features = 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mean = (features / 5).mean(axis=0)
    picked = herding_order(features, 5)
    assert picked[0] == 2
    assert sorted(picked) == [0, 1, 2, 3, 4]
    for count in range(1, 5):  # each pick is the best of those left
        rest = [row for row in range(5) if row not in picked[: count - 1]]
        error = {r: np.linalg.norm((features / 5)[[*picked[: count - 1], r]].mean(axis=0) - mean) for r in rest}
        assert picked[count - 1] == min(error, key=error.__getitem__)


def test_herding_takes_equal_clips_in_their_order_and_each_once() -> None:
    assert herding_order(np.ones((4, 3)), 3) == [0, 1, 2]
    assert herding_order(np.zeros((3, 2)), 9) == [0, 1, 2]


def test_ties_of_herding_select_the_first_row() -> None:
    angles = np.radians([67, 21, 9, -67, -21, -9])  # pairs at equal distance, in exact arithmetic
    assert herding_order(np.stack([np.cos(angles), np.sin(angles)], axis=1), 6) == [2, 4, 1, 5, 0, 3]


def test_herding_of_few_clips_gives_what_there_is() -> None:
    assert herding_order(np.array([[1.0, 2.0]]), 4) == [0]
    assert herding_order(np.empty((0, 2)), 4) == []
    assert herding_order(np.ones((3, 2)), 0) == []


def test_herding_knows_direction_and_not_length() -> None:
    features = np.random.default_rng(0).normal(size=(20, 4))
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(20, 1))
    assert herding_order(features, 8) == herding_order(features * lengths, 8)


def test_herding_does_not_follow_digits_in_which_machines_differ() -> None:
    features = np.random.default_rng(0).normal(size=(20, 4))
    noise = 1 + 1e-9 * np.random.default_rng(1).normal(size=features.shape)
    assert herding_order(features * noise, 20) == herding_order(features, 20)


def test_rows_have_unit_norm_in_six_decimals_and_zero_rows_stay_zero() -> None:
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]], dtype=np.float32))
    assert rows.dtype == np.float64
    assert rows.tolist() == [[0.6, 0.8], [0.0, 0.0], [0.707107, 0.707107]]


def test_the_first_of_a_herding_are_the_herding_of_fewer() -> None:
    features = np.random.default_rng(0).normal(size=(30, 4))
    assert herding_order(features, 12)[:5] == herding_order(features, 5)


def test_a_record_keeps_the_order_of_classes_and_exemplars() -> None:
    memory = ExemplarMemory({"z": ("z-2", "z-1"), "a": ("a-1",), "m": ()})
    assert json.dumps(memory.to_dict()) == '{"z": ["z-2", "z-1"], "a": ["a-1"], "m": []}'


def test_an_update_leaves_the_memory_before_as_it_was() -> None:
    before = EMPTY_MEMORY.update({"a": keys_of("a", 9)}, size=6)
    before.update({"b": keys_of("b", 9)}, size=6)
    assert list(before.keys) == ["a"]
    assert before.count == 6
    assert EMPTY_MEMORY.count == 0
