"""Names of metrics and parameters: every one becomes a name that MLflow takes, and no two the same."""

from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from avcil_dist.tracking.events import as_metric_name

CLASSES = (
    *("rock/roll", "rock_roll", "rock:roll", "rock,roll", "..", ".", "...", "", "/", "//", " ", "a/../b", "-", "%"),
    *("x" * 260, "x" * 259 + "y", "日本", "e\u0301", "\u00e9", "😀", "\ud800", "Rock_Roll", "rock_roll-1a2b3c4d"),
)


def test_every_name_becomes_one_of_its_own_that_mlflow_takes() -> None:
    names = [as_metric_name(name) for name in CLASSES]
    assert len(set(names)) == len(names) == len(CLASSES)
    for name in names:
        _validate_metric_name(name)
        assert len(name) <= 250


def test_a_plain_name_stays_and_a_changed_one_is_readable() -> None:
    assert as_metric_name("loss/total") == "loss/total"
    assert as_metric_name("loss/of: rock") == "loss/of_ rock-" + as_metric_name("loss/of: rock")[-8:]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=300), max_size=8, unique=True))
def test_any_names_are_taken_and_distinct(names: list[str]) -> None:
    made = [as_metric_name(name) for name in names]
    assert len(set(made)) == len(names)
    for name in made:
        _validate_metric_name(name)
        assert len(name) <= 250
