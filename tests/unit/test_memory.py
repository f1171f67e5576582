import json

import numpy as np

from avcil_dist.data.exemplar_memory import EMPTY_MEMORY, ExemplarMemory, herding_order, random_order


def keys_of(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


def test_every_class_gets_an_equal_quota_of_its_first() -> None:
    memory = EMPTY_MEMORY.update({name: keys_of(name, 20) for name in "abc"}, size=10)
    assert memory.keys == {name: tuple(keys_of(name, 3)) for name in "abc"}
    assert memory.count == 9


def test_old_classes_keep_their_first_exemplars() -> None:
    before = EMPTY_MEMORY.update({"a": keys_of("a", 20), "b": keys_of("b", 20)}, size=12)
    after = before.update({"c": keys_of("c", 20)}, size=12)
    assert after.keys["a"] == before.keys["a"][:4]
    assert after.keys["b"] == before.keys["b"][:4]
    assert len(after.keys["c"]) == 4


def test_a_class_with_fewer_clips_than_the_quota_gives_what_it_has() -> None:
    memory = EMPTY_MEMORY.update({"a": keys_of("a", 2), "b": keys_of("b", 20), "c": keys_of("c", 1)}, size=15)
    assert {name: len(keys) for name, keys in memory.keys.items()} == {"a": 2, "b": 5, "c": 1}


def test_a_memory_larger_than_the_data_holds_all_of_it() -> None:
    memory = EMPTY_MEMORY.update({"a": keys_of("a", 5)}, size=1000)
    assert memory.keys == {"a": tuple(keys_of("a", 5))}


def test_a_random_order_follows_the_seed_and_the_class_and_holds_every_key_once() -> None:
    keys = keys_of("a", 50)
    order = random_order("a", keys, seed=0)
    assert sorted(order) == sorted(keys)
    assert order != keys
    assert order == random_order("a", keys, seed=0)
    assert order != random_order("a", keys, seed=1)
    assert order != random_order("b", keys, seed=0)


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


def test_herding_of_few_clips_gives_what_there_is() -> None:
    assert herding_order(np.array([[1.0, 2.0]]), 4) == [0]
    assert herding_order(np.empty((0, 2)), 4) == []
    assert herding_order(np.ones((3, 2)), 0) == []


def test_herding_knows_direction_and_not_length() -> None:
    features = np.random.default_rng(0).normal(size=(20, 4))
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(20, 1))
    assert herding_order(features, 8) == herding_order(features * lengths, 8)


def test_the_first_of_a_herding_are_the_herding_of_fewer() -> None:
    features = np.random.default_rng(0).normal(size=(30, 4))
    assert herding_order(features, 12)[:5] == herding_order(features, 5)


def test_a_record_keeps_the_order_of_classes_and_exemplars() -> None:
    memory = ExemplarMemory({"z": ("z-2", "z-1"), "a": ("a-1",), "m": ()})
    again = ExemplarMemory.from_dict(json.loads(json.dumps(memory.to_dict())))
    assert list(again.keys.items()) == list(memory.keys.items())


def test_an_update_leaves_the_memory_before_as_it_was() -> None:
    before = EMPTY_MEMORY.update({"a": keys_of("a", 9)}, size=6)
    before.update({"b": keys_of("b", 9)}, size=6)
    assert list(before.keys) == ["a"]
    assert before.count == 6
    assert EMPTY_MEMORY.count == 0
