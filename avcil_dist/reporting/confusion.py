"""Confusion matrices of the report page: pictures of a pixel per pair of classes, and the most frequent confusions."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from avcil_dist.reporting.report import StreamReport

COLOUR = (0, 98, 168)  # red, green, blue; the style sheet brightens it on dark screens
NUM_PAIRS = 8


@dataclass(frozen=True)
class ConfusionView:
    """Confusion matrix after the last step of streams with one class order: rows are classes, columns predictions.

    `matrix` (C, C) is the fraction of each class's clips, the mean over streams. `classes` and their tasks are in order
    of arrival.
    """

    classes: Sequence[str]
    tasks: Sequence[int]
    matrix: np.ndarray

    @property
    def picture(self) -> str:
        """The matrix as the data of a PNG: its opacity is the square root of the fraction, so rare confusions show."""
        pixels = np.empty((*self.matrix.shape, 4), dtype=np.uint8)
        pixels[..., :3] = COLOUR
        pixels[..., 3] = (255 * np.sqrt(self.matrix)).round()
        output = io.BytesIO()
        Image.fromarray(pixels, "RGBA").save(output, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(output.getvalue()).decode()}"

    @property
    def names(self) -> list[tuple[str, int]]:
        """Each class with its task."""
        return list(zip(self.classes, self.tasks, strict=True))

    @property
    def borders(self) -> list[int]:
        """The first class of each task, and the number of classes."""
        tasks = list(self.tasks)
        return [tasks.index(task) for task in sorted(set(tasks))] + [len(tasks)]

    @property
    def pairs(self) -> list[tuple[str, int, str, int, float]]:
        """The most frequent confusions: class, its task, predicted class, its task, fraction of the class's clips."""
        wrong = self.matrix * ~np.eye(len(self.matrix), dtype=bool)
        places = np.argsort(-wrong, axis=None, kind="stable")[:NUM_PAIRS]
        rows, columns = np.unravel_index(places, wrong.shape)
        return [
            (self.classes[row], self.tasks[row], self.classes[column], self.tasks[column], float(wrong[row, column]))
            for row, column in zip(rows, columns, strict=True)
            if wrong[row, column] > 0
        ]

    @property
    def drift(self) -> float | None:
        """Fraction of the clips of old tasks that are predicted as a class of the last task; None after one step."""
        tasks = np.asarray(self.tasks)
        is_old = tasks < tasks.max()
        return float(self.matrix[is_old][:, ~is_old].sum(axis=1).mean()) if is_old.any() else None


def confusion_view(streams: Sequence[StreamReport]) -> ConfusionView | None:
    """Return the mean matrix of those streams that have the class order and the step of the first.

    None where the first has no confusion matrix: it was written by an early version.
    """
    first = streams[0]
    step = first.metrics.step
    alike = [s for s in streams if s.scenario == first.scenario and s.metrics.step == step and s.metrics.confusion]
    if not first.metrics.confusion:
        return None
    classes = first.scenario.seen(step)
    numbers = {name: number for number, name in enumerate(classes)}
    matrices = []
    for stream in alike:
        counts = np.zeros((len(classes), len(classes)))
        for name, row in stream.metrics.confusion.items():
            for predicted, count in row.items():
                if name in numbers and predicted in numbers:
                    counts[numbers[name], numbers[predicted]] = count
        total = counts.sum(axis=1, keepdims=True)
        matrices.append(np.divide(counts, total, out=np.zeros_like(counts), where=total > 0))
    tasks = [task for task in range(step + 1) for _ in first.scenario.new(task)]
    return ConfusionView(classes, tasks, np.mean(matrices, axis=0))
