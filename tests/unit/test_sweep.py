"""Values of a sweep's settings on the command line."""

import pytest

from avcil_dist.errors import ConfigError
from launch.sweep import num_points, split_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,3", ["1", "2", "3"]),
        ("[3,2],[1,1,3]", ["[3,2]", "[1,1,3]"]),
        ("[[1,2],[3]],4", ["[[1,2],[3]]", "4"]),
        ("{a: 1, b: [2, 3]},none", ["{a: 1, b: [2, 3]}", "none"]),
        ("s3://bucket/x-{0..9}.tar", ["s3://bucket/x-{0..9}.tar"]),
    ],
)
def test_commas_separate_values_except_within_brackets(text: str, values: list[str]) -> None:
    assert split_values(f"section.key={text}") == [f"section.key={value}" for value in values]


@pytest.mark.parametrize("word", ["seed", "name="])
def test_a_word_without_values_is_left_to_the_configuration(word: str) -> None:
    assert split_values(word) == [word]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[3,2", r"'\]' is missing"),
        ("a[b", r"'\]' is missing"),
        ("3,2]", r"'\]' without its opening bracket"),
        ("[3,{a: 1]}", r"'\]' without its opening bracket"),
        ("1,,2", "empty value"),
        ("1,", "empty value"),
        (",1", "empty value"),
    ],
)
def test_a_value_that_is_cut_short_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"command line: scenario.classes_per_step=.*: .*{problem}"):
        split_values(f"scenario.classes_per_step={text}")


def test_the_number_of_streams_is_that_of_all_combinations() -> None:
    assert num_points(["seed=1,2,3", "method=a,b", "name=x"], ablation=False) == 6
    assert num_points(["seed=1,2"], ablation=True, class_orders=5) == 80
    assert num_points([], ablation=False) == 1
