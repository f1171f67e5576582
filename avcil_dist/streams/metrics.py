"""Metrics of class-incremental learning: accuracies, the accuracy matrix, forgetting. Pure functions of numbers.

A[k][j] is the accuracy on the test clips of task j after step k, over the logits of all seen classes. Every
accuracy is a fraction in [0, 1]. Predictions come from `training/evaluation.py`.

To add a metric: a field of `StreamMetrics` with a default, an argument of `after`, and a line in `scalars` if it
is one number per step. Artifacts written before have no such key and read as the default; `storage.parse_json` ignores
keys without a field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from avcil_dist.scenario import ClassName
from avcil_dist.streams.region_shares import RegionShares
from avcil_dist.streams.score_metrics import ScoreMetrics

Accuracy = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Epoch = Annotated[int, Field(ge=-1, lt=1 << 53)]  # from 0; -1 is before training


def accuracy_row(labels: ArrayLike, predictions: ArrayLike, tasks: Sequence[slice]) -> list[float]:
    """Return A[k][0 … k]: the accuracy on the test clips of each task.

    `labels` and `predictions` (N,) are positions in the head, `tasks` the head's slice of each
    task. Raises ValueError for a task without clips.
    """
    truth, correct = _correct(labels, predictions)
    row = []
    for task, classes in enumerate(tasks):
        members = (truth >= classes.start) & (truth < classes.stop)
        if not members.any():
            raise ValueError(f"task {task}: no test clip has a label in {classes.start} … {classes.stop - 1}")
        row.append(float(correct[members].mean()))
    return row


def seen_accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return a_k: the accuracy on all test clips (N,) of seen classes. Raises ValueError when there are none."""
    _, correct = _correct(labels, predictions)
    if not correct.size:
        raise ValueError("no test clips")
    return float(correct.mean())


def per_class_accuracy(labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of each class by name; `classes[i]` has label i. Classes without clips are left out."""
    truth, correct = _correct(labels, predictions)
    return {
        name: float(correct[truth == label].mean())
        for label, name in enumerate(classes)
        if np.any(truth == label)  # a subset of the test clips may lack a class
    }


def confusion(labels: ArrayLike, predictions: ArrayLike, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the sparse confusion matrix: class → predicted class → clips. A prediction of -1 does not count."""
    truth, _ = _correct(labels, predictions)
    predicted = np.asarray(predictions)
    matrix: dict[str, dict[str, int]] = {}
    for label, name in enumerate(classes):
        others, counts = np.unique(predicted[(truth == label) & (predicted >= 0)], return_counts=True)
        if np.any(truth == label):
            matrix[name] = {classes[int(other)]: int(count) for other, count in zip(others, counts, strict=True)}
    return matrix


def forgetting(matrix: Sequence[Sequence[float]]) -> list[float]:
    """Return F_k = mean over j < k of (max over j ≤ i < k of A[i][j], less A[k][j]), for each k ≥ 1.

    `matrix[k]` is A[k][0 … k]. The maximum is over the steps after task j was learnt. F_k is negative where old
    tasks gain (Chaudhry et al. 2018).
    """
    losses = []
    for k in range(1, len(matrix)):
        drops = [max(matrix[i][j] for i in range(j, k)) - matrix[k][j] for j in range(k)]
        losses.append(_mean(drops))
    return losses


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float | None:
    """Return BWT = mean over j < k of (A[k][j] - A[j][j]), k the last step; None after step 0.

    The accuracy on earlier tasks now, less that when each was learnt (Lopez-Paz and Ranzato 2017, eq. 3).
    """
    last = len(matrix) - 1
    return _mean([matrix[last][j] - matrix[j][j] for j in range(last)]) if last > 0 else None


@dataclass(frozen=True)
class SubsetMetrics:
    """a_0 … a_step on a subset of the test clips, and the size of the subset at the last step."""

    seen_accuracy: tuple[Accuracy, ...]
    num_test_clips: Count

    @property
    def mean_accuracy(self) -> float:
        """The mean of a_0 … a_step."""
        return _mean(self.seen_accuracy)


@dataclass(frozen=True)
class MemoryUse:
    """Memory that a step hands to the next one: clips as they are stored, the model, and the state of the method."""

    num_clips: Count
    clip_bytes: Count
    model_bytes: Count
    state_bytes: Count

    @property
    def bytes(self) -> int:
        """All of it, in bytes."""
        return self.clip_bytes + self.model_bytes + self.state_bytes


@dataclass(frozen=True)
class EpochChoice:
    """Epoch whose weights a step committed, from 0 (-1: before training); `num_ties` later ones are equally accurate.

    `num_epochs` were trained; 0 in a step without training. `val_accuracy` is None where epochs were not compared.
    """

    epoch: Epoch
    num_epochs: Count
    val_accuracy: Accuracy | None = None
    num_ties: Count = 0

    def __str__(self) -> str:
        """Return the epoch for people, counted from 1, such as 13/100; with * where later ones are as good."""
        if not self.num_epochs:
            return "–"
        return f"{self.epoch + 1}/{self.num_epochs}{'*' if self.num_ties else ''}"


@dataclass(frozen=True)
class EpochMetrics:
    """Mean training loss and last learning rate of an epoch; its validation accuracy, if it was validated."""

    loss: Annotated[float, Field(allow_inf_nan=False)]
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    val_accuracy: Accuracy | None = None


@dataclass(frozen=True)
class StreamMetrics:
    """Metrics of a stream up to and including `step`: the content of `metrics.json`.

    `accuracy` holds rows 0 … step of the accuracy matrix, `seen_accuracy` a_0 … a_step. `per_class`, `confusion`,
    `num_test_clips`, `epoch` (the selected one), `val_accuracy`, `epochs` and `scores` (metrics of all class scores)
    are those of the last step. `source_disjoint` covers the test clips whose source video no training clip shares,
    `memory` is that after the last step. `choices` are the selected epochs of steps 0 … step, None for a step that an
    earlier version trained. `regions` has shares of the attention where sounding regions are known. Raises ValueError
    for inconsistent lengths.
    """

    step: Annotated[int, Field(ge=0, lt=1 << 20)]
    accuracy: tuple[tuple[Accuracy, ...], ...]
    seen_accuracy: tuple[Accuracy, ...]
    per_class: Mapping[ClassName, Accuracy] = field(repr=False)
    num_test_clips: Count
    epoch: Epoch
    val_accuracy: Accuracy | None
    confusion: Mapping[ClassName, Mapping[ClassName, Count]] = field(default_factory=dict, repr=False)
    source_disjoint: SubsetMetrics | None = None
    memory: MemoryUse | None = None
    choices: tuple[EpochChoice | None, ...] = ()
    epochs: tuple[EpochMetrics, ...] = field(default=(), repr=False)
    scores: ScoreMetrics | None = None
    regions: RegionShares | None = None

    def __post_init__(self) -> None:
        lengths = [len(row) for row in self.accuracy]
        if lengths != list(range(1, self.step + 2)):
            raise ValueError(f"step {self.step}: the accuracy matrix has rows of {lengths[:9]}")
        if len(self.seen_accuracy) != self.step + 1:
            raise ValueError(f"step {self.step}: there are {len(self.seen_accuracy)} seen accuracies")
        if len(self.choices) not in (0, self.step + 1):
            raise ValueError(f"step {self.step}: there are {len(self.choices)} selected epochs")

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
        num_epochs: int = 0,
        num_ties: int = 0,
        confusion: Mapping[str, Mapping[str, int]] | None = None,
        source_disjoint: tuple[float, int] | None = None,
        memory: MemoryUse | None = None,
        epochs: Sequence[EpochMetrics] = (),
        scores: ScoreMetrics | None = None,
        regions: RegionShares | None = None,
    ) -> "StreamMetrics":
        """Return the metrics after `step` from those after the step before it (None at step 0).

        `source_disjoint` is the seen accuracy on those clips and their number.
        """
        if step != (0 if previous is None else previous.step + 1):
            raise ValueError(f"step {step} does not follow on {'nothing' if previous is None else previous.step}")
        before = previous.source_disjoint.seen_accuracy if previous and previous.source_disjoint else ()
        choices = (previous.choices or (None,) * step) if previous else ()
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
            memory=memory,
            choices=(*choices, EpochChoice(epoch, num_epochs, val_accuracy, num_ties)),
            epochs=tuple(epochs),
            scores=scores,
            regions=regions and regions.following(previous.regions if previous else None, step),
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

    @property
    def backward_transfer(self) -> float | None:
        """BWT after the last step; None after step 0."""
        return backward_transfer(self.accuracy)

    def scalars(self) -> dict[str, float]:
        """The metrics of the last step that are one number, by name; those without a value are left out."""
        values = {
            "seen_accuracy": self.seen_accuracy[-1],
            "mean_accuracy": self.mean_accuracy,
            "forgetting": self.forgetting[-1] if self.forgetting else None,
            "average_forgetting": self.average_forgetting,
            "source_disjoint_accuracy": self.source_disjoint.seen_accuracy[-1] if self.source_disjoint else None,
            "memory_bytes": self.memory.bytes if self.memory else None,
            "backward_transfer": self.backward_transfer,
            **(asdict(self.scores) if self.scores else {}),
            "attention_on_sound": self.regions.after("attention")[-1] if self.regions else None,
            "evidence_on_sound": self.regions.after("evidence")[-1] if self.regions else None,
        }
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with derived numbers beside the measured ones."""
        record = asdict(self)
        record |= {
            "mean_accuracy": self.mean_accuracy,
            "forgetting": self.forgetting,
            "average_forgetting": self.average_forgetting,
            "backward_transfer": self.backward_transfer,
        }
        if self.source_disjoint is not None:
            record["source_disjoint"]["mean_accuracy"] = self.source_disjoint.mean_accuracy
        if self.memory is not None:
            record["memory"]["bytes"] = self.memory.bytes
        return record


def _correct(labels: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the labels (N,) and whether each prediction is correct (N,)."""
    truth, predicted = np.asarray(labels), np.asarray(predictions)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(f"labels {truth.shape} and predictions {predicted.shape} are not one of each per clip")
    return truth, truth == predicted


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
