"""A listing: the classes of a data set in their order, and its clips in theirs. Types and checks for all readers."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from avcil_dist import storage
from avcil_dist.data.manifest import SPLITS, Split
from avcil_dist.errors import DataError

KEY_LENGTH = 90  # a tar member's name has at most 100 characters


@dataclass(frozen=True)
class ListedClip:
    """A file, its clip key, and the video (`source`) and second (`start`) that it begins at.

    With `cut` (start, duration in seconds; duration None: to the end), the clip is a part of the file.
    """

    path: str
    key: str
    source: str
    start: float = 0.0
    cut: tuple[float, float | None] | None = None


class ListingRow(NamedTuple):
    """A clip with its class and split."""

    label: str
    split: Split
    clip: ListedClip


@dataclass(frozen=True)
class Listing:
    """The classes and the clips of a data set, both ordered."""

    classes: tuple[str, ...]
    rows: tuple[ListingRow, ...]

    @classmethod
    def from_rows(cls, rows: list[ListingRow]) -> "Listing":
        """A listing whose classes are in order of first appearance."""
        return cls(tuple(dict.fromkeys(row.label for row in rows)), tuple(rows))


def safe_key(name: str) -> str:
    """A file name without its ending as a clip key: `7q1E_12.09` is `7q1E_12-09`."""
    key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    return key if len(key) <= KEY_LENGTH else f"{key[: KEY_LENGTH - 13]}-{storage.sha256(name.encode())[:12]}"


def parse_split(name: str, where: str) -> Split:
    """The split called `name`. Raises DataError, naming `where`, for any other name."""
    for split in get_args(Split):
        if name == split:
            return split
    raise DataError(f"{where}: split {name!r} is none of {', '.join(SPLITS)}")


def first_row(path: Path) -> list[str]:
    """The first row of a csv; empty for a folder or an empty file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8-sig") as file:
        return next(csv.reader(file), [])


def csv_rows(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """The rows of a csv without header, each with its file and line for error messages.

    Raises DataError for a row with an empty column, or with another number of columns.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if len(row) != columns or not all(text.strip() for text in row):
                raise DataError(f"{where}: has not {columns} columns")
            yield where, row
