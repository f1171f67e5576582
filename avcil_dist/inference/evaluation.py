"""Metrics of predictions: pure functions of `StepPredictions`, as values that json has."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from avcil_dist.inference.step_predictions import StepPredictions
from avcil_dist.streams.metrics import (
    accuracy_row,
    backward_transfer,
    forgetting,
    per_class_accuracy,
    seen_accuracy,
)
from avcil_dist.streams.resampling import DRAWS, LEVEL, bootstrap_means, interval
from avcil_dist.streams.score_metrics import TOP, correct_within_task, in_top, score_metrics


def evaluation(made: StepPredictions, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Return all metrics of a step's predictions, and the intervals of accuracies; none for 0 `draws`."""
    labels, predictions = made.predicted.labels, made.predicted.predictions
    scores = score_metrics(labels, made.predicted.scores, made.tasks)
    within = correct_within_task(labels, made.predicted.scores, made.tasks)
    result = described(made) | {
        "num_clips": len(labels),
        "num_damaged": int((predictions < 0).sum()),
        "seen_accuracy": seen_accuracy(labels, predictions),
        "top5_accuracy": scores.top5_accuracy,
        "mean_average_precision": scores.mean_average_precision,
        "task_accuracy": accuracy_row(labels, predictions, made.tasks),
        "task_il_accuracy": scores.task_il_accuracy,
        "task_il": [float(within[_rows(labels, task)].mean()) for task in made.tasks],
        "per_class": per_class_accuracy(labels, predictions, made.classes),
    }
    if draws:
        result["intervals"] = intervals(made, draws=draws, seed=seed)
    return result


def described(made: StepPredictions) -> dict[str, Any]:
    """Return what was evaluated: stream, step, split and condition."""
    condition, noise = made.request.condition, made.request.condition.noise
    return {
        "stream": made.request.stream,
        "step": made.artifact.step,
        "split": made.request.split,
        "modality": condition.modality or made.artifact.config.model.modality,
        "noise": noise and {"audio_db": noise.audio_db, "visual_db": noise.visual_db, "seed": noise.seed},
    }


def intervals(made: StepPredictions, *, draws: int, seed: int) -> dict[str, Any]:
    """Return intervals of the accuracies by bootstrap over source videos: low and high, by the metric's name."""
    labels, scores = made.predicted.labels, made.predicted.scores
    correct = made.correct.astype(float)
    columns = {"seen_accuracy": correct, "task_il_accuracy": correct_within_task(labels, scores, made.tasks)}
    if scores.shape[1] > TOP:
        columns["top5_accuracy"] = in_top(labels, scores, TOP)
    tasks = [np.where(_rows(labels, task), correct, np.nan) for task in made.tasks]
    means = bootstrap_means(np.stack([*columns.values(), *tasks], axis=1), made.sources, seed=seed, draws=draws)
    bounds = [interval(column) for column in means.T]
    return {
        "level": LEVEL,
        "draws": draws,
        "seed": seed,
        "num_sources": len(set(made.sources)),
        **dict(zip(columns, bounds, strict=False)),
        "task_accuracy": bounds[len(columns) :],
    }


def stream_evaluation(by_step: Sequence[StepPredictions]) -> dict[str, Any]:
    """Return the metrics over steps 0, 1, …, from the predictions of each step on all classes that it has seen."""
    matrix = [accuracy_row(made.predicted.labels, made.predicted.predictions, made.tasks) for made in by_step]
    seen = [seen_accuracy(made.predicted.labels, made.predicted.predictions) for made in by_step]
    scores = [score_metrics(made.predicted.labels, made.predicted.scores, made.tasks) for made in by_step]
    drops = forgetting(matrix)
    return {
        "accuracy": matrix,
        "seen_accuracy": seen,
        "mean_accuracy": float(np.mean(seen)),
        "forgetting": drops,
        "average_forgetting": float(np.mean(drops)) if drops else None,
        "backward_transfer": backward_transfer(matrix),
        "task_il_accuracy": [found.task_il_accuracy for found in scores],
        "top5_accuracy": [found.top5_accuracy for found in scores],
        "mean_average_precision": [found.mean_average_precision for found in scores],
    }


def _rows(labels: np.ndarray, task: slice) -> np.ndarray:
    """Whether each clip is of a task."""
    rows: np.ndarray = (labels >= task.start) & (labels < task.stop)
    return rows
