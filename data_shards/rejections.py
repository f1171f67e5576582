"""Rejected clips: the kinds of fault, the table `rejected.csv`, and its summary per class."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from pydantic import TypeAdapter, ValidationError

from avcil_dist import storage
from avcil_dist.errors import DataError
from avcil_dist.reporting.tables import WordTable

Kind = Literal["missing", "silent", "short", "corrupt", "format", "duplicate", "crash"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_CLASSES_SHOWN = 40
MAX_BYTES = 1 << 30
# Python reads a byte of a path that is no UTF-8 as a lone surrogate.
_ESCAPES = {"\\": "\\\\"} | {chr(0xDC00 + byte): f"\\x{byte:02x}" for byte in range(0x80, 0x100)}
_CHARACTERS = {escape: character for character, escape in _ESCAPES.items()}


@dataclass(frozen=True)
class Rejection:
    """A clip that is in no shard, the kind of its fault, and a description of the fault."""

    path: str
    label: str
    split: str
    kind: Kind
    reason: str

    def spelled(self) -> "Rejection":
        r"""Return the rejection in UTF-8: a byte of a path that is none is `\xff`, a backslash is `\\`."""
        return replace(self, path=_spelled(self.path), reason=_spelled(self.reason))

    def restored(self) -> "Rejection":
        """The inverse of `spelled`."""
        return replace(self, path=_restored(self.path), reason=_restored(self.reason))


_REJECTIONS = TypeAdapter(list[Rejection])


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
    rows.writerows(asdict(rejection.spelled()) for rejection in rejected)
    storage.write_bytes(url, text.getvalue().encode())


def read_rejections(url: str) -> tuple[Rejection, ...]:
    """Read the csv of `write_rejections`. Raises DataError for any other file."""
    try:
        rows = list(csv.DictReader(io.StringIO(storage.read_bytes(url, max_bytes=MAX_BYTES).decode(), newline="")))
        return tuple(rejection.restored() for rejection in _REJECTIONS.validate_python(rows))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{url}: not a table of rejected clips ({error}); restore it, or build again") from None
    except ValidationError as error:
        fault = storage.describe(error)
        raise DataError(f"{url}: not a table of rejected clips ({fault}); restore it, or build again") from None


def _spelled(text: str) -> str:
    return re.sub(r"[\\\ud800-\udfff]", lambda match: _ESCAPES.get(match[0]) or f"\\u{ord(match[0]):04x}", text)


def _restored(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        return _CHARACTERS.get(match[0]) or chr(int(match[0][2:], 16))

    return re.sub(r"\\\\|\\x[89a-f][0-9a-f]|\\ud[89a-f][0-9a-f]{2}", character, text)


def rejection_table(rejected: Iterable[Rejection]) -> WordTable:
    """Table of rejected clips per class and kind of fault for a terminal, classes with most rejections first."""
    counts = Counter((rejection.label, rejection.kind) for rejection in rejected)
    kinds = [kind for kind in KINDS if any(counted == kind for _, counted in counts)]
    totals = Counter[str]()
    for (label, _), count in counts.items():
        totals[label] += count
    table = WordTable("rejected clips")
    table.add_column("class")
    for heading in (*kinds, "all"):
        table.add_column(heading, justify="right")
    ranked = sorted(totals, key=lambda label: (-totals[label], label))
    for label in ranked[:MAX_CLASSES_SHOWN]:
        numbers = (str(counts[label, kind] or "") for kind in kinds)
        table.add_row(label or "(no class)", *numbers, str(totals[label]))
    if len(ranked) > MAX_CLASSES_SHOWN:
        rest = ranked[MAX_CLASSES_SHOWN:]
        sums = [sum(counts[label, kind] for label in rest) for kind in kinds]
        table.add_row(f"{len(rest)} more classes", *map(str, sums), str(sum(totals[label] for label in rest)))
    table.add_section()
    table.add_row("all", *(str(sum(counts[label, kind] for label in totals)) for kind in kinds), str(totals.total()))
    return table
