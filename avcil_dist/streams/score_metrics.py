"""Metrics of class scores, beyond the fraction of correct predictions. Pure functions of labels (N,) and scores (N, C).

Labels are positions in the head. The row of a damaged clip is NaN: it is wrong by every metric. Accuracies are
fractions in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

TOP = 5

Scores = NDArray[np.floating]
Labels = NDArray[np.integer]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class ScoreMetrics:
    """Metrics of the test clips' scores after a step. `top5_accuracy` is None for 5 classes or fewer."""

    task_il_accuracy: Fraction
    mean_average_precision: Fraction
    top5_accuracy: Fraction | None = None


def score_metrics(labels: Labels, scores: Scores, tasks: Sequence[slice]) -> ScoreMetrics:
    """Return the metrics of a step. `tasks` are the head's slices. Raises ValueError without clips."""
    if not len(labels):
        raise ValueError("no test clips")
    top5 = float(in_top(labels, scores, TOP).mean()) if scores.shape[1] > TOP else None
    within = float(correct_within_task(labels, scores, tasks).mean())
    return ScoreMetrics(within, mean_average_precision(labels, probabilities(scores)), top5)


def probabilities(scores: Scores) -> NDArray[np.float64]:
    """Return the softmax of each row (N, C), float64; the row of a damaged clip stays NaN.

    They are probabilities where the scores are logits. Distances and regressions to 0 and 1 keep their order within a
    row, but are not calibrated.
    """
    if not scores.size:
        return np.zeros(scores.shape)
    values = scores.astype(np.float64)
    values = np.exp(values - values.max(axis=1, keepdims=True))
    normalised: NDArray[np.float64] = values / values.sum(axis=1, keepdims=True)
    return normalised


def in_top(labels: Labels, scores: Scores, k: int) -> NDArray[np.bool_]:
    """Whether the label of each clip (N,) is among its k highest scores. Of equal scores, the first class counts."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    higher = (scores > own) | ((scores == own) & before)
    return ~np.isnan(own[:, 0]) & (higher.sum(axis=1) < k)


def correct_within_task(labels: Labels, scores: Scores, tasks: Sequence[slice]) -> NDArray[np.bool_]:
    """Whether each clip (N,) is correct among the classes of its own task (Task-IL: the task is given)."""
    correct = np.zeros(len(labels), dtype=bool)
    for task in tasks:
        rows = (labels >= task.start) & (labels < task.stop)
        correct[rows] = in_top(labels[rows] - task.start, scores[rows, task], 1)
    return correct


def average_precision(is_class: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """Return Σ (R_n - R_{n-1}) P_n over the thresholds n of the scores (N,), from the highest down.

    Clips with equal scores share a threshold. This is the area under the steps of precision over recall, without
    interpolation, as scikit-learn defines it (its import would take a second of every step's start). Raises ValueError
    for a class without clips.
    """
    if not is_class.any():
        raise ValueError("a class without clips has no average precision")
    order = np.argsort(-scores, kind="stable")
    ranked, found = scores[order], np.cumsum(is_class[order])
    last_of_ties = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    precision = found[last_of_ties] / (last_of_ties + 1)
    gains = np.diff(found[last_of_ties], prepend=0) / is_class.sum()
    return min(float((gains * precision).sum()), 1.0)


def mean_average_precision(labels: Labels, chances: NDArray[np.floating]) -> float:
    """Return the mean over classes of the average precision, one class against the rest (macro mAP).

    `chances` (N, C) are probabilities; a damaged clip ranks last. Classes without clips do not count. Raises ValueError
    when no class has clips.
    """
    ranked = np.nan_to_num(chances, nan=-1.0)
    present = np.unique(labels)
    if not present.size:
        raise ValueError("no test clips")
    return float(np.mean([average_precision(labels == label, ranked[:, label]) for label in present]))
