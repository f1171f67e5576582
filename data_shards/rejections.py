"""Rejected clips: the kinds of fault, the table `rejected.csv`, and its summary per class."""

import csv
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from avcil_dist import storage
from avcil_dist.errors import DataError

Kind = Literal["missing", "silent", "short", "corrupt", "format", "duplicate", "crash"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_CLASSES_SHOWN = 40


@dataclass(frozen=True)
class Rejection:
    """A clip that is in no shard, the kind of its fault, and a description of the fault."""

    path: str
    label: str
    split: str
    kind: Kind
    reason: str


class ClipRejectedError(DataError):
    """A clip that cannot be taken, with the kind of its fault."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def write_rejections(url: str, rejected: Iterable[Rejection]) -> None:
    """Write the rejections as csv."""
    text = io.StringIO()
    rows = csv.DictWriter(text, ["path", "label", "split", "kind", "reason"], lineterminator="\n")
    rows.writeheader()
    rows.writerows(asdict(rejection) for rejection in rejected)
    storage.write_bytes(url, text.getvalue().encode(errors="surrogateescape"))  # a path may be no UTF-8


def read_rejections(url: str) -> tuple[Rejection, ...]:
    """Read the csv of `write_rejections`."""
    rows: Iterable[dict[str, Any]] = csv.DictReader(
        io.StringIO(storage.read_bytes(url).decode(errors="surrogateescape"))
    )
    return tuple(Rejection(**row) for row in rows)


def rejection_table(rejected: Iterable[Rejection]) -> Table:
    """Table of rejected clips per class and kind of fault for a terminal, classes with most rejections first."""
    counts = Counter((rejection.label, rejection.kind) for rejection in rejected)
    kinds = [kind for kind in KINDS if any(counted == kind for _, counted in counts)]
    totals = Counter[str]()
    for (label, _), count in counts.items():
        totals[label] += count
    table = Table("class", *kinds, "all", title="rejected clips", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    for label in ranked[:MAX_CLASSES_SHOWN]:
        table.add_row(Text(label), *(str(counts[label, kind] or "") for kind in kinds), str(totals[label]))
    if len(ranked) > MAX_CLASSES_SHOWN:
        rest = ranked[MAX_CLASSES_SHOWN:]
        sums = [sum(counts[label, kind] for label in rest) for kind in kinds]
        table.add_row(f"{len(rest)} more classes", *map(str, sums), str(sum(totals[label] for label in rest)))
    table.add_section()
    table.add_row("all", *(str(sum(counts[label, kind] for label in totals)) for kind in kinds), str(totals.total()))
    return table
