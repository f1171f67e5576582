"""Metrics on numbers worked out by hand."""

import json
from dataclasses import MISSING, fields, replace

import pytest

from avcil_dist import storage
from avcil_dist.errors import DataError
from avcil_dist.streams.metrics import (
    EpochChoice,
    MemoryUse,
    StreamMetrics,
    SubsetMetrics,
    accuracy_row,
    backward_transfer,
    confusion,
    forgetting,
    per_class_accuracy,
    seen_accuracy,
)
from avcil_dist.streams.score_metrics import ScoreMetrics

# Tasks of 3, 1 and 2 classes: nothing here divides evenly.
LABELS = [0, 0, 1, 2, 3, 3, 3, 4, 5, 5]
PREDICTIONS = [0, 1, 1, 2, 3, 5, 5, 5, 5, 5]
TASKS = [slice(0, 3), slice(3, 4), slice(4, 6)]


def read(record: object) -> StreamMetrics:
    return storage.parse_json(json.dumps(record).encode(), StreamMetrics, "metrics", "m.json")


def make_metrics(rows: list[list[float]], seen: list[float]) -> StreamMetrics:
    metrics = None
    for step, (row, accuracy) in enumerate(zip(rows, seen, strict=True)):
        metrics = StreamMetrics.after(
            metrics,
            step=step,
            row=row,
            seen=accuracy,
            per_class={"dog": accuracy},
            num_test_clips=10 * (step + 1),
            epoch=step + 5,
            val_accuracy=None if step else 0.5,
        )
    assert metrics is not None
    return metrics


def test_the_accuracy_of_a_task_is_over_its_own_clips() -> None:
    assert accuracy_row(LABELS, PREDICTIONS, TASKS) == pytest.approx([3 / 4, 1 / 3, 2 / 3])


def test_seen_accuracy_counts_clips_not_tasks() -> None:
    seen = seen_accuracy(LABELS, PREDICTIONS)
    assert seen == pytest.approx(6 / 10)
    assert seen != pytest.approx(sum(accuracy_row(LABELS, PREDICTIONS, TASKS)) / 3)


def test_a_task_without_clips_is_an_error() -> None:
    with pytest.raises(ValueError, match="task 1"):
        accuracy_row([0, 1, 2, 4], [0, 1, 2, 4], TASKS)


def test_no_clips_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no test clips"):
        seen_accuracy([], [])


def test_a_missing_prediction_is_an_error() -> None:
    with pytest.raises(ValueError, match="per clip"):
        seen_accuracy([0, 1], [0])


def test_per_class_accuracy_leaves_out_a_class_without_clips() -> None:
    accuracy = per_class_accuracy([0, 0, 2], [0, 2, 2], ["dog", "cat", "bus"])
    assert accuracy == {"dog": 0.5, "bus": 1.0}


def test_confusions_are_counted_by_name_and_a_clip_without_prediction_in_none() -> None:
    matrix = confusion([0, 0, 0, 2, 2], [0, 2, -1, 2, 2], ["dog", "cat", "bus"])
    assert matrix == {"dog": {"dog": 1, "bus": 1}, "bus": {"bus": 2}}


def test_the_source_disjoint_accuracies_add_up_over_steps_and_survive_json() -> None:
    metrics = None
    for step, subset in enumerate([(0.5, 4), (0.25, 8)]):
        metrics = StreamMetrics.after(
            metrics,
            step=step,
            row=[0.5] * (step + 1),
            seen=0.5,
            per_class={},
            num_test_clips=9,
            epoch=0,
            val_accuracy=None,
            confusion={"dog": {"cat": 3}},
            source_disjoint=subset,
        )
    assert metrics is not None
    record = json.loads(json.dumps(metrics.to_dict()))
    assert record["source_disjoint"] == {"seen_accuracy": [0.5, 0.25], "mean_accuracy": 0.375, "num_test_clips": 8}
    assert read(record) == metrics


def test_forgetting_compares_with_the_best_earlier_step() -> None:
    matrix = [[0.9], [0.5, 0.8], [0.6, 0.3, 0.7]]
    # F_1 = 0.9 - 0.5; F_2 = mean(max(0.9, 0.5) - 0.6, 0.8 - 0.3)
    assert forgetting(matrix) == pytest.approx([0.4, 0.4])


def test_forgetting_is_negative_where_old_tasks_gain() -> None:
    assert forgetting([[0.5], [0.7, 0.9], [0.8, 0.9, 0.1]]) == pytest.approx([-0.2, -0.05])


def test_the_first_step_forgets_nothing() -> None:
    assert forgetting([[0.5]]) == []
    assert make_metrics([[0.5]], [0.5]).average_forgetting is None


def test_a_stream_grows_step_by_step() -> None:
    metrics = make_metrics([[0.9], [0.5, 0.8], [0.6, 0.3, 0.7]], [0.9, 0.6, 0.45])
    assert metrics.step == 2
    assert metrics.accuracy == ((0.9,), (0.5, 0.8), (0.6, 0.3, 0.7))
    assert metrics.mean_accuracy == pytest.approx(0.65)
    assert metrics.average_forgetting == pytest.approx(0.4)
    assert (metrics.num_test_clips, metrics.epoch, metrics.val_accuracy) == (30, 7, None)


def test_the_selected_epoch_of_every_step_is_recorded_from_the_step_on_that_records_it() -> None:
    old = replace(make_metrics([[0.9]], [0.9]), choices=())
    grown = StreamMetrics.after(
        old,
        step=1,
        row=[1, 1],
        seen=1,
        per_class={},
        num_test_clips=1,
        epoch=3,
        val_accuracy=0.5,
        num_epochs=9,
        num_ties=2,
    )
    assert grown.choices == (None, EpochChoice(3, 9, 0.5, 2))
    assert str(grown.choices[1]) == "4/9*"
    assert str(EpochChoice(0, 0)) == "–"
    assert read(json.loads(json.dumps(grown.to_dict()))) == grown


def test_a_step_that_is_left_out_is_an_error() -> None:
    first = make_metrics([[0.9]], [0.9])
    with pytest.raises(ValueError, match="does not follow"):
        StreamMetrics.after(
            first, step=2, row=[1, 1, 1], seen=1, per_class={}, num_test_clips=1, epoch=0, val_accuracy=None
        )


def test_a_row_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="accuracy matrix"):
        make_metrics([[0.9], [0.5]], [0.9, 0.5])


def test_the_record_survives_json() -> None:
    metrics = make_metrics([[0.9], [0.5, 0.8]], [0.9, 0.6])
    record = json.loads(json.dumps(metrics.to_dict()))
    assert read(record) == metrics
    assert record["forgetting"] == pytest.approx([0.4])
    assert record["mean_accuracy"] == pytest.approx(0.75)
    assert json.loads(json.dumps(make_metrics([[0.5]], [0.5]).to_dict()))["average_forgetting"] is None


@pytest.mark.parametrize("damage", [{"accuracy": None}, {"step": 5}, {"per_class": []}, {"epoch": None}])
def test_a_damaged_record_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"not metrics \((accuracy|per_class|epoch|step 5)"):
        read({**make_metrics([[0.9]], [0.9]).to_dict(), **damage})


def test_an_incomplete_record_is_refused() -> None:
    record = make_metrics([[0.9]], [0.9]).to_dict()
    del record["seen_accuracy"]
    with pytest.raises(DataError, match="seen_accuracy: Field required"):
        read(record)


def test_a_record_from_before_an_optional_metric_reads_with_its_default() -> None:
    record = make_metrics([[0.9]], [0.9]).to_dict()
    del record["confusion"], record["source_disjoint"], record["choices"]
    assert read(record) == replace(make_metrics([[0.9]], [0.9]), choices=())


def test_a_metric_of_a_later_version_is_ignored() -> None:
    metrics = make_metrics([[0.9]], [0.9])
    assert read(metrics.to_dict() | {"calibration": 0.3}) == metrics


def test_every_metric_added_after_the_first_version_has_a_default() -> None:
    required = {field.name for field in fields(StreamMetrics) if field.default is field.default_factory is MISSING}
    assert required == {"step", "accuracy", "seen_accuracy", "per_class", "num_test_clips", "epoch", "val_accuracy"}


def test_scalars_are_the_numbers_of_the_last_step() -> None:
    metrics = make_metrics([[0.9], [0.5, 0.8], [0.6, 0.3, 0.7]], [0.9, 0.6, 0.45])
    assert metrics.scalars() == pytest.approx(
        {
            "seen_accuracy": 0.45,
            "mean_accuracy": 0.65,
            "forgetting": 0.4,
            "average_forgetting": 0.4,
            "backward_transfer": -0.4,
        }
    )
    assert set(make_metrics([[0.5]], [0.5]).scalars()) == {"seen_accuracy", "mean_accuracy"}
    subset = replace(metrics, source_disjoint=SubsetMetrics((0.1, 0.2, 0.3), 4))
    assert subset.scalars()["source_disjoint_accuracy"] == 0.3
    assert subset.to_dict()["source_disjoint"]["mean_accuracy"] == pytest.approx(0.2)


def test_the_memory_is_counted_in_bytes_and_survives_json() -> None:
    metrics = replace(make_metrics([[0.9]], [0.9]), memory=MemoryUse(3, 1000, 200, 30))
    assert metrics.scalars()["memory_bytes"] == 1230
    record = json.loads(json.dumps(metrics.to_dict()))
    expected = {"num_clips": 3, "clip_bytes": 1000, "model_bytes": 200, "state_bytes": 30, "bytes": 1230}
    assert record["memory"] == expected
    assert read(record) == metrics


def test_forgetting_of_the_last_step_and_its_average_over_the_steps() -> None:
    metrics = make_metrics([[0.9], [0.7, 0.8], [0.5, 0.2, 0.7]], [0.9, 0.75, 0.45])
    assert metrics.forgetting == pytest.approx([0.2, 0.5])  # 0.9 - 0.7; mean of 0.9 - 0.5 and 0.8 - 0.2
    assert metrics.average_forgetting == pytest.approx(0.35)
    assert metrics.scalars()["forgetting"] == pytest.approx(0.5)


def test_the_number_of_rows_must_fit_the_step() -> None:
    with pytest.raises(ValueError, match="step 1: the accuracy matrix has rows of"):
        StreamMetrics(1, ((0.9,),), (0.9, 0.8), {}, 1, 0, None)


def test_the_number_of_seen_accuracies_must_fit_the_step() -> None:
    with pytest.raises(ValueError, match="seen accuracies"):
        StreamMetrics(1, ((0.9,), (0.5, 0.8)), (0.9,), {}, 1, 0, None)


def test_backward_transfer_is_the_gain_of_earlier_tasks_since_they_were_learnt() -> None:
    matrix = [[0.9], [0.5, 0.8], [0.6, 0.9, 0.7]]
    assert backward_transfer(matrix) == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert backward_transfer(matrix[:1]) is None


def test_metrics_of_scores_are_numbers_of_the_last_step_and_optional() -> None:
    metrics = make_metrics([[0.9], [0.5, 0.8]], [0.9, 0.6])
    assert "task_il_accuracy" not in metrics.scalars()
    scored = replace(metrics, scores=ScoreMetrics(0.95, 0.7))
    assert scored.scalars()["task_il_accuracy"] == 0.95
    assert "top5_accuracy" not in scored.scalars()
    assert read(scored.to_dict()) == scored
    record = metrics.to_dict()
    del record["scores"]  # as written by earlier versions
    assert read(record) == metrics
