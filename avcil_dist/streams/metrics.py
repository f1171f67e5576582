"""What a step is worth: accuracies, the accuracy matrix, forgetting. Pure functions of numbers.

A[k][j] is the accuracy on the test clips of task j after step k, over the logits of all seen
classes. Every accuracy is a fraction in [0, 1]. Who predicts is `evaluate.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy_row(labels: ArrayLike, predictions: ArrayLike, tasks: Sequence[slice]) -> list[float]:
    """A[k][0 … k]: the accuracy on the test clips of each task.

    `labels` and `predictions` (N,) are positions in the head, `tasks` the head's slice of each
    task. Raises ValueError for a task without clips.
    """
    truth, right = _compare(labels, predictions)
    row = []
    for task, classes in enumerate(tasks):
        members = (truth >= classes.start) & (truth < classes.stop)
        if not members.any():
            raise ValueError(f"task {task}: no test clip has a label in {classes.start} … {classes.stop - 1}")
        row.append(float(right[members].mean()))
    return row


def seen_accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """a_k: the accuracy on all test clips (N,) of seen classes. Raises ValueError when there are none."""
    _, right = _compare(labels, predictions)
    if not right.size:
        raise ValueError("no test clips")
    return float(right.mean())


def per_class_accuracy(labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """The accuracy of each class by name; `classes[i]` has label i. A class without clips is left out."""
    truth, right = _compare(labels, predictions)
    return {
        name: float(right[truth == label].mean())
        for label, name in enumerate(classes)
        if np.any(truth == label)  # a subset of the test clips may miss a class; there is no accuracy of nothing
    }


def confusion(labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """The confusion matrix without its zeros: class → predicted class → clips; a clip not predicted (-1) is in none."""
    truth, _ = _compare(labels, predictions)
    guess = np.asarray(predictions)
    matrix: dict[str, dict[str, int]] = {}
    for label, name in enumerate(classes):
        found, counts = np.unique(guess[(truth == label) & (guess >= 0)], return_counts=True)
        if np.any(truth == label):
            matrix[name] = {classes[int(other)]: int(count) for other, count in zip(found, counts, strict=True)}
    return matrix


def forgetting(matrix: Sequence[Sequence[float]]) -> list[float]:
    """F_k = mean over j < k of (max over i < k of A[i][j], less A[k][j]), for each k ≥ 1.

    `matrix[k]` is A[k][0 … k]. The best is over the steps that knew the task, i ≥ j. Negative where
    old tasks gain (Chaudhry et al. 2018).
    """
    losses = []
    for k in range(1, len(matrix)):
        drops = [max(matrix[i][j] for i in range(j, k)) - matrix[k][j] for j in range(k)]
        losses.append(_mean(drops))
    return losses


@dataclass(frozen=True)
class SubsetMetrics:
    """a_0 … a_step on a part of the test clips, and how many there were at the last step."""

    seen_accuracy: tuple[float, ...]
    num_test_clips: int


@dataclass(frozen=True)
class StreamMetrics:
    """A stream up to and with `step`: the content of `metrics.json`.

    `accuracy` holds rows 0 … step of the accuracy matrix, `seen_accuracy` a_0 … a_step;
    `per_class`, `confusion`, `num_test_clips`, `epoch` (the selected one) and `val_accuracy` are of
    the last step; `source_disjoint` is of the test clips whose source no training clip shares.
    Raises ValueError where the parts do not fit each other.
    """

    step: int
    accuracy: tuple[tuple[float, ...], ...]
    seen_accuracy: tuple[float, ...]
    per_class: Mapping[str, float] = field(repr=False)
    num_test_clips: int
    epoch: int
    val_accuracy: float | None
    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict, repr=False)
    source_disjoint: SubsetMetrics | None = None

    def __post_init__(self) -> None:
        if [len(row) for row in self.accuracy] != list(range(1, self.step + 2)):
            raise ValueError(f"step {self.step}: the accuracy matrix has rows of {[len(row) for row in self.accuracy]}")
        if len(self.seen_accuracy) != self.step + 1:
            raise ValueError(f"step {self.step}: there are {len(self.seen_accuracy)} seen accuracies")

    @classmethod
    def after(
        cls,
        previous: "StreamMetrics | None",
        *,
        step: int,
        row: Sequence[float],
        seen: float,
        per_class: Mapping[str, float],
        num_test_clips: int,
        epoch: int,
        val_accuracy: float | None,
        confusion: Mapping[str, Mapping[str, int]] | None = None,
        source_disjoint: tuple[float, int] | None = None,
    ) -> "StreamMetrics":
        """The metrics after `step`, given those after the step before it (None at step 0).

        `source_disjoint` is the seen accuracy on those clips, and their number.
        """
        if step != (0 if previous is None else previous.step + 1):
            raise ValueError(f"step {step} does not follow on {'nothing' if previous is None else previous.step}")
        before = previous.source_disjoint.seen_accuracy if previous and previous.source_disjoint else ()
        subset = source_disjoint and SubsetMetrics((*before, source_disjoint[0]), source_disjoint[1])
        return cls(
            step=step,
            accuracy=(*(previous.accuracy if previous else ()), tuple(row)),
            seen_accuracy=(*(previous.seen_accuracy if previous else ()), seen),
            per_class=dict(per_class),
            num_test_clips=num_test_clips,
            epoch=epoch,
            val_accuracy=val_accuracy,
            confusion=dict(confusion or {}),
            source_disjoint=subset,
        )

    @property
    def mean_accuracy(self) -> float:
        """The mean of a_0 … a_step."""
        return _mean(self.seen_accuracy)

    @property
    def forgetting(self) -> list[float]:
        """F_1 … F_step; empty after step 0."""
        return forgetting(self.accuracy)

    @property
    def average_forgetting(self) -> float | None:
        """The mean of F_1 … F_step; None after step 0."""
        losses = self.forgetting
        return _mean(losses) if losses else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the derived numbers beside the measured ones."""
        return {
            "step": self.step,
            "accuracy": [list(row) for row in self.accuracy],
            "seen_accuracy": list(self.seen_accuracy),
            "mean_accuracy": self.mean_accuracy,
            "forgetting": self.forgetting,
            "average_forgetting": self.average_forgetting,
            "per_class": dict(self.per_class),
            "num_test_clips": self.num_test_clips,
            "epoch": self.epoch,
            "val_accuracy": self.val_accuracy,
            "confusion": {name: dict(row) for name, row in self.confusion.items()},
            "source_disjoint": self.source_disjoint
            and {
                "seen_accuracy": list(self.source_disjoint.seen_accuracy),
                "mean_accuracy": _mean(self.source_disjoint.seen_accuracy),
                "num_test_clips": self.source_disjoint.num_test_clips,
            },
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "StreamMetrics":
        """What `to_dict` wrote; derived numbers are computed anew. Raises ValueError for anything else."""
        try:
            val_accuracy, subset = record["val_accuracy"], record["source_disjoint"]
            return cls(
                step=int(record["step"]),
                accuracy=tuple(tuple(float(value) for value in row) for row in record["accuracy"]),
                seen_accuracy=tuple(float(value) for value in record["seen_accuracy"]),
                per_class={str(name): float(value) for name, value in record["per_class"].items()},
                num_test_clips=int(record["num_test_clips"]),
                epoch=int(record["epoch"]),
                val_accuracy=None if val_accuracy is None else float(val_accuracy),
                confusion={
                    str(name): {str(other): int(count) for other, count in row.items()}
                    for name, row in record["confusion"].items()
                },
                source_disjoint=subset
                and SubsetMetrics(
                    tuple(float(value) for value in subset["seen_accuracy"]), int(subset["num_test_clips"])
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of stream metrics: {error!r}") from None


def _compare(labels: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The labels as an array (N,), and where the predictions are right (N,)."""
    truth, guess = np.asarray(labels), np.asarray(predictions)
    if truth.shape != guess.shape or truth.ndim != 1:
        raise ValueError(f"labels {truth.shape} and predictions {guess.shape} are not one of each per clip")
    return truth, truth == guess


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
