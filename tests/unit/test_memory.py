import json

from avcil_dist.data.memory import EMPTY_MEMORY, Memory


def keys_of(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


def test_every_class_gets_an_equal_quota() -> None:
    memory = EMPTY_MEMORY.update({name: keys_of(name, 20) for name in "abc"}, size=10, seed=0)
    assert {name: len(keys) for name, keys in memory.keys.items()} == {"a": 3, "b": 3, "c": 3}
    assert memory.count == 9
    for name, keys in memory.keys.items():
        assert len(set(keys)) == 3
        assert set(keys) <= set(keys_of(name, 20))


def test_old_classes_keep_their_first_exemplars() -> None:
    before = EMPTY_MEMORY.update({"a": keys_of("a", 20), "b": keys_of("b", 20)}, size=12, seed=0)
    after = before.update({"c": keys_of("c", 20)}, size=12, seed=0)
    assert after.keys["a"] == before.keys["a"][:4]
    assert after.keys["b"] == before.keys["b"][:4]
    assert len(after.keys["c"]) == 4


def test_a_class_with_fewer_clips_than_the_quota_gives_what_it_has() -> None:
    memory = EMPTY_MEMORY.update({"a": keys_of("a", 2), "b": keys_of("b", 20)}, size=10, seed=0)
    assert sorted(memory.keys["a"]) == keys_of("a", 2)
    assert len(memory.keys["b"]) == 5


def test_the_choice_follows_the_seed_and_not_the_other_classes() -> None:
    candidates = {name: keys_of(name, 50) for name in "ab"}
    memory = EMPTY_MEMORY.update(candidates, size=20, seed=0)
    assert memory == EMPTY_MEMORY.update(candidates, size=20, seed=0)
    assert memory.keys["a"] != EMPTY_MEMORY.update(candidates, size=20, seed=1).keys["a"]
    assert memory.keys["a"] == EMPTY_MEMORY.update({"a": keys_of("a", 50)}, size=10, seed=0).keys["a"]


def test_a_memory_of_size_zero_knows_its_classes_and_holds_nothing() -> None:
    memory = EMPTY_MEMORY.update({"a": keys_of("a", 5)}, size=0, seed=0)
    assert memory.keys == {"a": ()}
    assert memory.count == 0


def test_a_record_keeps_the_order_of_classes_and_exemplars() -> None:
    memory = Memory({"z": ("z-2", "z-1"), "a": ("a-1",), "m": ()})
    again = Memory.from_record(json.loads(json.dumps(memory.to_record())))
    assert list(again.keys.items()) == list(memory.keys.items())


def test_an_update_leaves_the_memory_before_as_it_was() -> None:
    before = EMPTY_MEMORY.update({"a": keys_of("a", 9)}, size=6, seed=0)
    before.update({"b": keys_of("b", 9)}, size=6, seed=0)
    assert list(before.keys) == ["a"]
    assert before.count == 6
    assert EMPTY_MEMORY.count == 0
