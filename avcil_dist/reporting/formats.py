"""Tables in several formats: for a terminal, Markdown, csv and JSON."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from rich.console import Console

from avcil_dist.reporting.tables import WordTable, plain
from avcil_dist.text.visible import visible

TextFormat = Literal["md", "csv", "json"]
MARKDOWN = re.compile(r"[|`*_<>\[\]\\]")


@dataclass(frozen=True)
class Number:
    """Mean and sample standard deviation of fractions; None where there is no value, or one alone.

    `form`: the format of the mean as %.
    """

    mean: float | None
    deviation: float | None
    count: int
    form: str = ".1f"

    @classmethod
    def of(cls, fractions: Sequence[float | None], form: str = ".1f") -> "Number":
        """Return the number of these fractions, without those that are None."""
        values = [value for value in fractions if value is not None]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)) if values else None, deviation, len(values), form)

    def text(self, between: str) -> str:
        """Return it as %, the deviation with one decimal; – without a value."""
        if self.mean is None:
            return "–"
        shown = f"{100 * self.mean + 0.0:{self.form}}"
        return shown if self.deviation is None else f"{shown}{between}{100 * self.deviation:.1f}"


Cell = str | Number


@dataclass
class TextTable:
    """A table of words and numbers. The first three columns are words, the others are set to the right."""

    title: str
    headings: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def add_column(self, heading: str, cells: Sequence[Cell]) -> None:
        """Add a column on the right."""
        self.headings.append(heading)
        for row, cell in zip(self.rows, cells, strict=True):
            row.append(cell)


NUM_WORDS = 3  # columns of words


def print_table(table: TextTable, console: Console) -> None:
    """Print a table and its notes for a terminal, without empty columns."""
    rows = [_words(row) for row in table.rows]
    filled = [number for number in range(len(table.headings)) if not rows or any(row[number] for row in rows)]
    printed = WordTable(table.title, num_keys=sum(number < NUM_WORDS for number in filled))
    for number in filled:
        is_number = any(isinstance(row[number], Number) for row in table.rows)
        side = {"overflow": "fold"} if number < NUM_WORDS else {"justify": "right", "no_wrap": is_number}
        printed.add_column(table.headings[number], **side)
    for row in rows:
        printed.add_row(*(row[number] for number in filled))
    console.print(printed)
    for note in table.notes:
        console.print(plain(note), soft_wrap=True)


def formatted(table: TextTable, kind: TextFormat) -> str:
    """Return a table as text of a format."""
    return {"md": _markdown, "csv": _csv, "json": _json}[kind](table)


def _markdown(table: TextTable) -> str:
    def line(cells: Sequence[str]) -> str:
        escaped = (MARKDOWN.sub(r"\\\g<0>", visible(cell)) for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rule = ["---" if number < NUM_WORDS else "---:" for number in range(len(table.headings))]
    lines = [line(_flat(table.headings)), f"| {' | '.join(rule)} |", *(line(_words(row)) for row in table.rows)]
    return "\n".join([*lines, *(f"\n{visible(note)}" for note in table.notes)])


def _csv(table: TextTable) -> str:
    """A number is three columns: mean and deviation as fractions, and the number of streams."""
    is_number = [any(isinstance(row[number], Number) for row in table.rows) for number in range(len(table.headings))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    headings: list[str] = []
    for heading, number in zip(_flat(table.headings), is_number, strict=True):
        headings += [heading, f"{heading} deviation", f"{heading} count"] if number else [heading]
    writer.writerow(headings)
    for row in table.rows:
        cells: list[Any] = []
        for cell in row:
            cells += [cell.mean, cell.deviation, cell.count] if isinstance(cell, Number) else [cell]
        writer.writerow(cells)
    return text.getvalue().rstrip("\n")


def _json(table: TextTable) -> str:
    rows = [
        {
            heading: {"mean": cell.mean, "deviation": cell.deviation, "count": cell.count}
            if isinstance(cell, Number)
            else cell
            for heading, cell in zip(_flat(table.headings), row, strict=True)
        }
        for row in table.rows
    ]
    return json.dumps({"rows": rows, "notes": table.notes}, indent=1, ensure_ascii=False)


def _words(row: Sequence[Cell]) -> list[str]:
    return [cell.text(" ± ") if isinstance(cell, Number) else cell for cell in row]


def _flat(headings: Sequence[str]) -> list[str]:
    """Headings in one line each."""
    return [heading.replace("\n", " ") for heading in headings]
