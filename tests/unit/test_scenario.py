import pytest

from avcil_dist.errors import ConfigError
from avcil_dist.scenario import Scenario, make_scenario

FIVE = ("ant", "bee", "cow", "dog", "eel")


def test_equal_steps_follow_the_listed_order() -> None:
    scenario = make_scenario(FIVE[:4], classes_per_step=2)
    assert scenario.steps == (("ant", "bee"), ("cow", "dog"))
    assert scenario.num_steps == 2
    assert scenario.labels == {"ant": 0, "bee": 1, "cow": 2, "dog": 3}


def test_unequal_steps_cut_the_head_into_their_own_slices() -> None:
    scenario = make_scenario(FIVE, classes_per_step=[2, 1, 2])
    assert [scenario.new(step) for step in range(3)] == [("ant", "bee"), ("cow",), ("dog", "eel")]
    assert [scenario.num_old(step) for step in range(3)] == [0, 2, 3]
    assert [scenario.num_seen(step) for step in range(3)] == [2, 3, 5]
    assert scenario.old(0) == ()
    assert scenario.old(2) == ("ant", "bee", "cow")
    assert scenario.seen(1) == ("ant", "bee", "cow")
    assert scenario.seen(2) == scenario.classes == FIVE
    assert scenario.head_slices(0) == (slice(0, 2),)
    assert scenario.head_slices(2) == (slice(0, 2), slice(2, 3), slice(3, 5))


def test_new_classes_lie_in_the_last_slice_of_the_head() -> None:
    scenario = make_scenario(FIVE, classes_per_step=[1, 3, 1], shuffle=4)
    for step in range(scenario.num_steps):
        last = scenario.head_slices(step)[-1]
        assert scenario.classes[last] == scenario.new(step)
        assert [scenario.labels[name] for name in scenario.new(step)] == list(range(last.start, last.stop))


def test_chosen_classes_arrive_in_their_own_order() -> None:
    assert make_scenario(FIVE, classes_per_step=[1, 1], classes=["dog", "ant"]).steps == (("dog",), ("ant",))


def test_a_shuffle_is_a_permutation_that_its_seed_decides() -> None:
    names = tuple(f"c{number}" for number in range(40))
    first, again, other = (make_scenario(names, classes_per_step=10, shuffle=seed).classes for seed in (0, 0, 1))
    assert first == again
    assert len({names, first, other}) == 3
    assert sorted(first) == sorted(names)


def test_equal_scenarios_are_equal() -> None:
    assert make_scenario(FIVE, classes_per_step=[2, 3]) == Scenario((FIVE[:2], FIVE[2:]))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"classes_per_step": 5, "classes": ["ant", "fox"]},
            "scenario.classes: 'fox' is not in the data; its classes are ant, ",
        ),
        ({"classes_per_step": 1, "classes": ["ant", "bee", "ant"]}, "scenario.classes: 'ant' is listed twice"),
        ({"classes_per_step": [2, 2]}, "scenario.classes_per_step: 2 steps hold 4 of 5 classes: 'eel' is in no step"),
        (
            {"classes_per_step": 2},
            "scenario.classes_per_step: the steps need 6 classes, there are 5; list the sizes of the steps, such as "
            "[2,2,1]",
        ),
        ({"classes_per_step": [3, 3]}, "scenario.classes_per_step: the steps need 6 classes, there are 5"),
    ],
)
def test_a_partition_that_does_not_fit_is_refused(arguments: dict, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_scenario(FIVE, **arguments)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
