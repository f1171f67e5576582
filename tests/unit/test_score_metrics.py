"""Metrics of class scores, against scikit-learn and against loops over clips."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from avcil_dist.streams.score_metrics import (
    correct_within_task,
    in_top,
    mean_average_precision,
    probabilities,
    score_metrics,
)

RANDOM = np.random.default_rng(0)
LABELS = np.concatenate([np.arange(9), RANDOM.integers(9, size=191)])
SCORES = RANDOM.normal(size=(200, 9)) + 2 * np.eye(9)[LABELS]
TASKS = [slice(0, 4), slice(4, 6), slice(6, 9)]


def test_top_k_is_that_of_scikit_learn() -> None:
    for k in (1, 3, 5):
        assert in_top(LABELS, SCORES, k).mean() == top_k_accuracy_score(LABELS, SCORES, k=k)
    np.testing.assert_array_equal(in_top(LABELS, SCORES, 1), SCORES.argmax(axis=1) == LABELS)


def test_of_equal_scores_the_first_class_counts() -> None:
    assert in_top(np.array([0, 1, 2]), np.ones((3, 3)), 2).tolist() == [True, True, False]


@pytest.mark.parametrize("decimals", [15, 1])  # with one decimal many clips have equal scores
def test_average_precision_is_that_of_scikit_learn(decimals: int) -> None:
    chances = np.round(probabilities(SCORES), decimals)
    expected = np.mean([average_precision_score(label == LABELS, chances[:, label]) for label in range(9)])
    assert mean_average_precision(LABELS, chances) == pytest.approx(expected)


def test_a_class_without_clips_does_not_count() -> None:
    rows = LABELS != 3
    expected = np.mean([average_precision_score(LABELS[rows] == n, SCORES[rows, n]) for n in range(9) if n != 3])
    assert mean_average_precision(LABELS[rows], SCORES[rows]) == pytest.approx(expected)


def test_task_il_takes_the_best_class_of_the_own_task() -> None:
    expected = []
    for label, scores in zip(LABELS, SCORES, strict=True):
        [task] = [task for task in TASKS if task.start <= label < task.stop]
        expected.append(task.start + scores[task].argmax() == label)
    assert correct_within_task(LABELS, SCORES, TASKS).tolist() == expected
    assert np.mean(expected) > (SCORES.argmax(axis=1) == LABELS).mean()


def test_a_damaged_clip_is_wrong_by_every_metric() -> None:
    perfect = np.eye(6)[np.arange(6)] * 9
    whole = score_metrics(np.arange(6), perfect, [slice(0, 3), slice(3, 6)])
    assert (whole.task_il_accuracy, whole.mean_average_precision, whole.top5_accuracy) == (1, 1, 1)
    perfect[0] = np.nan
    damaged = score_metrics(np.arange(6), perfect, [slice(0, 3), slice(3, 6)])
    assert damaged.task_il_accuracy == damaged.top5_accuracy == 5 / 6
    assert damaged.mean_average_precision == pytest.approx((5 + 1 / 6) / 6)  # the damaged one ranks last


def test_five_classes_have_no_top_5() -> None:
    assert score_metrics(np.arange(5), np.eye(5), [slice(0, 5)]).top5_accuracy is None


def test_probabilities_are_a_softmax_in_float64() -> None:
    chances = probabilities(np.array([[1000.0, 1000.0 + np.log(3)]], dtype=np.float32))
    np.testing.assert_allclose(chances, [[0.25, 0.75]], rtol=1e-4)
