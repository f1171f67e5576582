"""Clip table: the clips of a data set as columns of numbers and bytes, without a Python object per clip.

The columns may be arrays in memory or parts of a file that all processes of a node map (`clip_table_file.py`):

- `keys`, uint8: the keys, each ended by a line feed; `key_ends`: the position after that line feed;
- `offset.MEMBER`, `size.MEMBER`: the place of a member of each clip in its shard, in bytes; 0 for a shard without it;
- `region`, float64, four numbers per clip, NaN where the region is not known; absent if none is.

Integers have 32 bits where all values of a column fit, otherwise 64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from pydantic import Field

KEYS, KEY_ENDS, OFFSET, SIZE, REGION = "keys", "key_ends", "offset.", "size.", "region"
REGION_NUMBERS = 4
LINE_FEED = b"\n"
UINT32_END = 1 << 32

Fraction = Annotated[float, Field(ge=0, le=1)]
Region = tuple[Fraction, Fraction, Fraction, Fraction]  # top, left, bottom, right, as fractions


class ClipTable:
    """Rows of clips over columns, or over the rows `rows` of them. Immutable."""

    def __init__(self, columns: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        self.columns, self._rows = columns, rows
        self._keys, self._ends = columns[KEYS], columns[KEY_ENDS]
        self.members = tuple(name.removeprefix(OFFSET) for name in columns if name.startswith(OFFSET))

    @classmethod
    def of(
        cls,
        keys: Sequence[str],
        offsets: Mapping[str, np.ndarray],
        sizes: Mapping[str, np.ndarray],
        regions: Sequence[Region | None] | None = None,
    ) -> "ClipTable":
        """Return the table of clips by key, with offsets and sizes by member."""
        text = "".join(f"{key}\n" for key in keys).encode("ascii", "replace")  # as long as the keys; others are refused
        lengths = np.fromiter(map(len, keys), dtype=np.int64, count=len(keys))
        columns = {KEYS: np.frombuffer(text, dtype=np.uint8), KEY_ENDS: _compact(np.cumsum(lengths + 1))}
        columns |= {f"{OFFSET}{member}": _compact(np.asarray(values)) for member, values in offsets.items()}
        columns |= {f"{SIZE}{member}": _compact(np.asarray(values)) for member, values in sizes.items()}
        if regions is not None:
            unknown = (np.nan,) * REGION_NUMBERS
            columns[REGION] = np.array([region or unknown for region in regions], dtype=np.float64).ravel()
        return cls(columns)

    def __len__(self) -> int:
        return len(self._ends if self._rows is None else self._rows)

    def select(self, rows: np.ndarray) -> "ClipTable":
        """Return the table of these rows. Its columns are not copied; a row takes 4 bytes."""
        return ClipTable(self.columns, _compact(self._at(rows)))

    def key(self, row: int) -> str:
        """Return the key of a row."""
        return self._key_bytes(self._row(row))[:-1].decode("ascii", "replace")

    def keys(self, first: int, count: int) -> list[str]:
        """Return the keys of `count` rows from row `first` on."""
        return self.piece(KEYS, first, count).tobytes().decode("ascii", "replace").split("\n")[:-1]

    def spans(self, member: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return offset and size of a member of each row in its shard, int64. Raises KeyError for no such member."""
        rows = self._at(rows)
        offsets, sizes = self.columns[f"{OFFSET}{member}"], self.columns[f"{SIZE}{member}"]
        return offsets[rows].astype(np.int64), sizes[rows].astype(np.int64)

    def region(self, row: int) -> Region | None:
        """Return the region of a row; None where it is not known."""
        if REGION not in self.columns:
            return None
        start = self._row(row) * REGION_NUMBERS
        top, left, bottom, right = self.columns[REGION][start : start + REGION_NUMBERS].tolist()
        return None if np.isnan(top) else (top, left, bottom, right)

    def piece(self, name: str, first: int, count: int) -> np.ndarray:
        """Return a column of `count` rows from row `first` on, without a copy where the rows are consecutive.

        `key_ends` counts from the first of the rows. A column that the table lacks is 0, or NaN for regions.
        """
        if name in (KEYS, KEY_ENDS):
            return self._key_piece(name, first, count)
        width = REGION_NUMBERS if name == REGION else 1
        if name not in self.columns:
            return np.full(count * width, np.nan) if name == REGION else np.zeros(count, dtype=np.uint32)
        if self._rows is None:
            return self.columns[name][first * width : (first + count) * width]
        rows = self._rows[first : first + count]
        return self.columns[name].reshape(-1, width)[rows].ravel()

    def _key_piece(self, name: str, first: int, count: int) -> np.ndarray:
        """Return `piece` of the columns of keys."""
        if self._rows is not None:
            keys = [self._key_bytes(int(row)) for row in self._rows[first : first + count]]
            if name == KEYS:
                return np.frombuffer(b"".join(keys), dtype=np.uint8)
            return np.cumsum([len(key) for key in keys], dtype=np.int64)
        start = int(self._ends[first - 1]) if first else 0
        if name == KEYS:
            return self._keys[start : int(self._ends[first + count - 1]) if count else start]
        return self._ends[first : first + count].astype(np.int64) - start

    def _key_bytes(self, row: int) -> bytes:
        return self._keys[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])].tobytes()

    def _row(self, row: int) -> int:
        return row if self._rows is None else int(self._rows[row])

    def _at(self, rows: np.ndarray) -> np.ndarray:
        return rows if self._rows is None else self._rows[rows].astype(np.int64)


@dataclass(frozen=True)
class Rows:
    """`count` consecutive rows of a table, from row `first` on."""

    table: ClipTable
    first: int
    count: int

    def piece(self, name: str) -> np.ndarray:
        """Return a column of these rows."""
        return self.table.piece(name, self.first, self.count)


@dataclass(frozen=True)
class Column:
    """A column of several parts in their order: its name, its numbers, and a function that yields it in pieces."""

    name: str
    dtype: np.dtype
    count: int
    pieces: Callable[[], Iterator[np.ndarray]]


def join_columns(parts: Sequence[Rows]) -> list[Column]:
    """Return the columns of parts of tables, one after the other. Equal content gives equal columns."""
    tables = {id(part.table): part.table for part in parts}.values()
    members = sorted({member for table in tables for member in table.members})
    has_regions = any(REGION in table.columns for table in tables)
    names = [KEYS, KEY_ENDS, *(f"{kind}{member}" for member in members for kind in (OFFSET, SIZE))]
    return [_join_column(parts, name) for name in [*names, *([REGION] if has_regions else [])]]


def join(parts: Sequence[Rows]) -> ClipTable:
    """Return the table of parts of tables, one after the other, in memory."""
    columns = join_columns(parts)
    return ClipTable({column.name: np.concatenate([column.dtype.type([]), *column.pieces()]) for column in columns})


def _join_column(parts: Sequence[Rows], name: str) -> Column:
    def pieces(dtype: np.dtype) -> Iterator[np.ndarray]:
        end = 0
        for part in parts:
            values = part.piece(name)
            if name == KEY_ENDS:
                values = values + end
                end = int(values[-1]) if len(values) else end
            yield values.astype(dtype, copy=False)

    dtype: np.dtype
    if name == KEYS:
        dtype, count = np.dtype(np.uint8), sum(len(part.piece(KEYS)) for part in parts)
    elif name == REGION:
        dtype, count = np.dtype(np.float64), REGION_NUMBERS * sum(part.count for part in parts)
    else:
        limits = [_limits(values) for values in pieces(np.dtype(np.int64))]
        least, most = min((low for low, _ in limits), default=0), max((high for _, high in limits), default=0)
        dtype, count = _integer(least, most), sum(part.count for part in parts)
    return Column(name, dtype, count, partial(pieces, dtype))


def _limits(values: np.ndarray) -> tuple[int, int]:
    return (int(values.min()), int(values.max())) if len(values) else (0, 0)


def _integer(least: int, most: int) -> np.dtype:
    return np.dtype(np.uint32 if least >= 0 and most < UINT32_END else np.int64)


def _compact(values: np.ndarray) -> np.ndarray:
    """Return integers in 32 bits where they fit, otherwise in 64."""
    return values.astype(_integer(*_limits(values)), copy=False)
