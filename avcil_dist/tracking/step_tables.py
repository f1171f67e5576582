"""Tables and picture of a step's run: accuracy by class, and the confusion matrix in the order of the head.

The tables are JSON in the form of pandas' `split`, which MLflow's pages show as tables.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from avcil_dist.streams.metrics import StreamMetrics

CLASSES, CONFUSION, PICTURE = "class_accuracy.json", "confusion.json", "confusion.png"
LEGEND = "rows: true class, columns: predicted class, in the order of the steps; % of a row's clips"
SIDE = 900  # of the picture's matrix in pixels, about
MAX_LABELLED = 40  # classes whose names are written beside the matrix
LEFT, TOP, EDGE = 150, 40, 10
INK, WEAK, LINE = (30, 30, 30), (246, 248, 251), (203, 90, 60)
STRONG = np.array([12, 60, 120])


def write_step_tables(folder: Path, metrics: StreamMetrics, task_sizes: Sequence[int]) -> list[str]:
    """Write the tables and the picture to a folder; return the names of the tables.

    `task_sizes`: the number of classes of each task; a line in the picture separates the tasks.
    """
    names = list(metrics.per_class)
    sums = {name: sum(metrics.confusion.get(name, {}).values()) for name in names}
    _write(
        folder / CLASSES,
        ("class", "accuracy", "clips"),
        [[name, round(metrics.per_class[name], 6), sums[name]] for name in names],
    )
    if not metrics.confusion:
        return [CLASSES]
    _write(
        folder / CONFUSION,
        ("class", "predicted", "clips"),
        [
            [name, other, count]
            for name, row in metrics.confusion.items()
            for other, count in sorted(row.items(), key=lambda item: -item[1])
        ],
    )
    (folder / PICTURE).write_bytes(confusion_picture(confusion_shares(metrics), names, task_sizes))
    return [CLASSES, CONFUSION]


def confusion_shares(metrics: StreamMetrics) -> np.ndarray:
    """Return the share of each class's predicted clips (classes, predicted classes), in [0, 1]."""
    names = list(metrics.per_class)
    numbers = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for name, row in metrics.confusion.items():
        for other, count in row.items():
            if other in numbers and name in numbers:
                counts[numbers[name], numbers[other]] = count
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def confusion_picture(shares: np.ndarray, names: Sequence[str], task_sizes: Sequence[int]) -> bytes:
    """Return a png of the matrix: a row for each class, a column for each predicted class, darker for more clips."""
    cell = max(2, SIDE // len(names))
    has_names = len(names) <= MAX_LABELLED
    left, top = (LEFT if has_names else TOP), TOP
    blend = np.kron(shares, np.ones((cell, cell)))[..., None]
    pixels = np.asarray(WEAK) * (1 - blend) + STRONG * blend
    side = cell * len(names)
    picture = Image.new("RGB", (left + side + EDGE, top + side + EDGE), "white")
    picture.paste(Image.fromarray(pixels.astype(np.uint8)), (left, top))
    draw = ImageDraw.Draw(picture)
    for end in np.cumsum(task_sizes)[:-1]:
        if end < len(names):
            at = int(end) * cell
            draw.line((left + at, top, left + at, top + side), fill=LINE, width=2)
            draw.line((left, top + at, left + side, top + at), fill=LINE, width=2)
    draw.text(
        (left, EDGE),
        "rows: true class, columns: predicted class, in the order of the steps; % of a row's clips",
        fill=INK,
        font_size=15,
    )
    if has_names:
        _write_names(draw, shares, names, cell, left, top)
    file = io.BytesIO()
    picture.save(file, format="png", optimize=True)
    return file.getvalue()


def _write_names(
    draw: ImageDraw.ImageDraw, shares: np.ndarray, names: Sequence[str], cell: int, left: int, top: int
) -> None:
    """Write the class beside each row, and the percentage into each cell that has clips."""
    size = max(9, min(15, cell // 2))
    for row, name in enumerate(names):
        middle = top + row * cell + cell // 2
        text = name if len(name) <= 20 else f"{name[:19]}…"
        draw.text((left - 6, middle), text, fill=INK, anchor="rm", font_size=size)
        for column in np.flatnonzero(shares[row] >= 0.005):
            share = shares[row, column]
            ink = "white" if share > 0.5 else INK
            at = left + int(column) * cell + cell // 2
            if cell >= 24:
                draw.text((at, middle), f"{100 * share:.0f}", fill=ink, anchor="mm", font_size=size)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.write_text(json.dumps({"columns": list(columns), "data": rows}))
