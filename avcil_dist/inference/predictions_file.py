"""Files of predictions: one clip per line, with the probability of every class; csv for people, npz for programs."""

import csv
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from avcil_dist import storage
from avcil_dist.data.npy import parse_words
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.inference.step_predictions import StepPredictions
from avcil_dist.streams.score_metrics import Scores, probabilities

FORMATS = (".csv", ".npz")
NAMES = ("key", "label", "prediction")  # columns, or arrays
MAX_WORDS_BYTES = 1 << 30
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


def is_predictions_file(path: str) -> bool:
    """Whether a path names a file of predictions, by its ending."""
    return path.endswith(FORMATS)


def check_predictions_format(path: str) -> None:
    """Raise ConfigError for a file whose ending is none of FORMATS."""
    if not is_predictions_file(path):
        raise ConfigError(f"{path}: predictions are written as {' or '.join(FORMATS)}; choose one of these endings")


def write_predictions(path: str, table: PredictionTable) -> None:
    """Write a csv file, or an npz file with the arrays key, label, prediction, probabilities and classes.

    Raises ConfigError as `check_predictions_format` does.
    """
    check_predictions_format(path)
    data = _as_csv(table) if path.endswith(".csv") else _as_npz(table)
    storage.write_bytes(path, data)


class PredictedLabels(NamedTuple):
    """Key, label and predicted class of each clip; the prediction of a damaged clip is ""."""

    keys: list[str]
    labels: list[str]
    predictions: list[str]


def read_labels(path: str) -> PredictedLabels:
    """Read a file of `write_predictions` without its probabilities.

    Raises DataError, naming the file, for a damaged one, and for one without labels, such as that of new clips.
    """
    with storage.open_file(path) as file:
        columns = _labels_of_csv(file, path) if path.endswith(".csv") else _labels_of_npz(file, path)
    if len({len(column) for column in columns}) > 1:
        raise DataError(f"{path}: its columns have {', '.join(str(len(column)) for column in columns)} clips")
    return columns


def _labels_of_csv(file: BinaryIO, path: str) -> PredictedLabels:
    rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    try:
        header = next(rows, [])
        missing = [name for name in NAMES if name not in header]
        if missing:
            raise _without(missing[0], path)
        places = [header.index(name) for name in NAMES]
        found = [[row[place] for place in places] for row in rows]
    except (UnicodeDecodeError, csv.Error, IndexError) as error:
        raise DataError(f"{path}: line {rows.line_num + 1}: no line of a file of predictions ({error})") from None
    return PredictedLabels(*([row[number] for row in found] for number in range(len(NAMES))))


def _labels_of_npz(file: BinaryIO, path: str) -> PredictedLabels:
    try:
        with zipfile.ZipFile(file) as archive:
            return PredictedLabels(*(_member(archive, name, path) for name in NAMES))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: no file of predictions ({error})") from None


def _member(archive: zipfile.ZipFile, name: str, path: str) -> list[str]:
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise _without(name, path)
    if archive.getinfo(member).file_size > MAX_WORDS_BYTES:
        raise DataError(f"{path}: {name}: more than {MAX_WORDS_BYTES} bytes")
    return parse_words(archive.read(member), f"{path}: {name}")


def _without(name: str, path: str) -> DataError:
    return DataError(
        f"{path}: has no {name} of its clips; `avcil eval STREAM --predictions FILE` writes key, label and prediction"
    )


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
