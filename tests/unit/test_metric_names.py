"""Names of metrics: every class has one that MLflow takes, and no two have the same."""

from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.tracking.events import _step_metrics, as_metric_name

CLASSES = (
    *("rock/roll", "rock_roll", "rock:roll", "rock,roll", "..", ".", "...", "", "/", "//", " ", "a/../b", "-", "%"),
    *("x" * 260, "x" * 259 + "y", "日本", "e\u0301", "\u00e9", "😀", "\ud800", "Rock_Roll", "rock_roll-1a2b3c4d"),
)


def names_of(classes: tuple[str, ...]) -> list[str]:
    metrics = StreamMetrics(0, ((0.5,),), (0.5,), dict.fromkeys(classes, 0.5), 9, 1, None)
    return [name for name in _step_metrics(metrics) if name.startswith("class_accuracy/")]


def test_every_class_has_a_name_of_its_own_that_mlflow_takes() -> None:
    names = names_of(CLASSES)
    assert len(set(names)) == len(names) == len(CLASSES)
    for name in names:
        _validate_metric_name(name)
        assert len(name) <= 250
        assert name.count("/") == 1


def test_a_plain_name_stays_and_a_changed_one_is_readable() -> None:
    assert names_of(("playing guitar", "rock/roll")) == [
        "class_accuracy/playing guitar",
        "class_accuracy/rock_roll-0a2cf6ac",
    ]
    assert as_metric_name("loss/total") == "loss/total"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=300), max_size=8, unique=True))
def test_any_names_are_taken_and_distinct(names: list[str]) -> None:
    made = [as_metric_name(name) for name in names]
    assert len(set(made)) == len(names)
    for name in made:
        _validate_metric_name(name)
        assert len(name) <= 250
