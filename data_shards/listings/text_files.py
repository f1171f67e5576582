"""Text that a user wrote: csv files, lists of lines, numbers. Any fault is one line with the file and the line.

Text is UTF-8, with or without a byte order mark. Lines are bounded, and none has a NUL: no name of a file can have it.
"""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from avcil_dist import storage
from avcil_dist.errors import DataError

MAX_LINE = 1 << 20  # characters
MAX_SECONDS = 10_000_000  # four months


def read_lines(path: Path, newline: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, each with its number; `newline` as for `open`.

    Raises DataError for a file that cannot be read as text.
    """
    try:
        with io.TextIOWrapper(storage.open_regular(path), encoding="utf-8-sig", newline=newline) as file:
            yield from _lines(file, path)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def first_row(path: Path) -> list[str]:
    """The first row of a csv; empty for a folder or an empty file. Raises DataError for what is no csv in UTF-8."""
    if not path.is_file():
        return []
    with open_csv(path) as rows:
        return next(rows, (0, []))[1]


def csv_rows(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """The rows of a csv without header, each with its file and line for error messages.

    Raises DataError for a row with an empty column, or with another number of columns.
    """
    with open_csv(path) as rows:
        for line, row in rows:
            where = f"{path}: line {line}"
            if len(row) != columns or not all(text.strip() for text in row):
                raise DataError(f"{where}: has not {columns} columns")
            yield where, row


@contextmanager
def open_csv(path: Path) -> Iterator[Iterator[tuple[int, list[str]]]]:
    """The rows of a csv, each with its last line. Raises DataError, naming file and line, for a file that is none."""
    line = 1
    is_over = False

    def lines() -> Iterator[str]:
        nonlocal is_over
        yield from (text for _, text in read_lines(path, newline=""))
        is_over = True

    def rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal line
        reader = csv.reader(lines())
        for row in reader:
            if is_over:  # the reader looked for the rest of this row, and takes it without
                raise csv.Error("it does not end")
            yield reader.line_num, row
            line = reader.line_num + 1

    try:
        yield rows()
    except csv.Error as error:
        raise DataError(f"{path}: line {line}: not a row of a csv ({error}); is a quote not closed?") from None


def parse_seconds(text: str, where: str) -> float:
    """The seconds of a text such as `12` or `3.5`. Raises DataError for any other, and for one beyond all videos."""
    if not re.fullmatch(r"[0-9]{1,20}(\.[0-9]{0,20})?", text.strip()) or float(text) > MAX_SECONDS:
        raise DataError(f"{where}: {text[:40]!r} is not a number of seconds from 0 to {MAX_SECONDS}")
    return float(text)


def is_number(text: str) -> bool:
    """Whether a text is a whole number in ASCII digits."""
    return text.isascii() and text.isdigit()


def _lines(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise DataError(f"{path}: line {number}: longer than {MAX_LINE} characters; is it a text file?")
        if "\0" in line:
            raise DataError(f"{path}: line {number}: has a NUL; is it a text file? Save it as CSV UTF-8")
        yield number, line


def _not_utf8(path: Path) -> DataError:
    """The error for a text file in another encoding, naming its first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            try:
                data.decode()
            except UnicodeDecodeError:
                return DataError(f"{path}: line {number} is not UTF-8; save it as CSV UTF-8")
    return DataError(f"{path}: not UTF-8; save it as CSV UTF-8")
