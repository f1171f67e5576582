"""Files of predictions: one clip per line, with the probability of every class; csv for people, npz for programs."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avcil_dist import storage
from avcil_dist.errors import ConfigError
from avcil_dist.inference.step_predictions import StepPredictions
from avcil_dist.streams.score_metrics import Scores, probabilities

FORMATS = (".csv", ".npz")
PROBABILITY = "p:"  # before the name of a class, in the heading of a column


@dataclass(frozen=True)
class PredictionTable:
    """Predicted classes of clips. `scores` (N, C) are NaN in the row of a damaged clip; `labels` None: not known."""

    keys: Sequence[str]
    labels: Sequence[str] | None
    classes: Sequence[str]
    scores: Scores

    @classmethod
    def of_step(cls, made: StepPredictions) -> "PredictionTable":
        """Return the predictions of a step."""
        labels = [made.classes[label] for label in made.predicted.labels]
        return cls(made.keys, labels, made.classes, made.predicted.scores)

    @property
    def predictions(self) -> list[str]:
        """Predicted class of each clip; "" for a damaged one."""
        best = np.nan_to_num(self.scores, nan=-np.inf).argmax(axis=1)
        return [
            "" if np.isnan(row).any() else self.classes[label] for row, label in zip(self.scores, best, strict=True)
        ]


def check_predictions_format(path: str) -> None:
    """Raise ConfigError for a file whose ending is none of FORMATS."""
    if not path.endswith(FORMATS):
        raise ConfigError(f"{path}: predictions are written as {' or '.join(FORMATS)}; choose one of these endings")


def write_predictions(path: str, table: PredictionTable) -> None:
    """Write a csv file, or an npz file with the arrays key, label, prediction, probabilities and classes.

    Raises ConfigError as `check_predictions_format` does.
    """
    check_predictions_format(path)
    data = _as_csv(table) if path.endswith(".csv") else _as_npz(table)
    storage.write_bytes(path, data)


def _as_csv(table: PredictionTable) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    label = [] if table.labels is None else ["label"]
    writer.writerow(["key", *label, "prediction", *(f"{PROBABILITY}{name}" for name in table.classes)])
    writer.writerows(_rows(table))
    return text.getvalue().encode()


def _rows(table: PredictionTable) -> Iterator[list[str]]:
    chances = probabilities(table.scores)
    for row, (key, prediction) in enumerate(zip(table.keys, table.predictions, strict=True)):
        label = [] if table.labels is None else [table.labels[row]]
        cells = [""] * len(table.classes) if not prediction else [f"{value:.6g}" for value in chances[row]]
        yield [key, *label, prediction, *cells]


def _as_npz(table: PredictionTable) -> bytes:
    buffer = io.BytesIO()
    labels = {} if table.labels is None else {"label": _text(table.labels)}
    np.savez_compressed(
        buffer,
        key=_text(table.keys),
        prediction=_text(table.predictions),
        probabilities=probabilities(table.scores).astype(np.float32),
        classes=_text(table.classes),
        allow_pickle=False,
        **labels,
    )
    return buffer.getvalue()


def _text(words: Sequence[str]) -> np.ndarray:
    """An array of text that numpy reads without pickle."""
    return np.array(list(words), dtype=np.str_)
