"""Sequence of records that may be very long: most of it is in a temporary file, so that memory does not bound it."""

import json
import operator
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from avcil_dist.errors import DataError

NUM_IN_MEMORY = 1 << 18
WRITTEN_AT_ONCE = 1 << 20  # bytes
READ_AT_ONCE = 1 << 12  # records

T = TypeVar("T")


class Records(Sequence[T]):
    """Records in their order: the first in memory, the others as lines of JSON in a file, with 8 bytes of memory."""

    def __init__(self, records: Iterable[T], encode: Callable[[T], Any], decode: Callable[[Any], T]) -> None:
        """Store all `records`. `encode` makes a value of one that JSON can carry, `decode` is its inverse."""
        self._decode = decode
        self._first: list[T] = []
        self._ends = array("q", [0])
        self._file: Any = None
        waiting = bytearray()
        for record in records:
            if len(self._first) < NUM_IN_MEMORY:
                self._first.append(record)
                continue
            # A byte of a path that is no UTF-8 is a lone surrogate, which JSON escapes.
            line = json.dumps(encode(record), separators=(",", ":")).encode() + b"\n"
            waiting += line
            self._ends.append(self._ends[-1] + len(line))
            if len(waiting) >= WRITTEN_AT_ONCE:
                self._write(waiting)
        self._write(waiting)

    def _write(self, waiting: bytearray) -> None:
        if not waiting:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="avcil-listing-")  # noqa: SIM115 - as long as this value
            self._file.write(waiting)
            self._file.flush()
        except OSError as error:
            place = tempfile.gettempdir()
            raise DataError(
                f"{place}: the rows of the listing cannot be written there ({error.strerror}); make room, or set TMPDIR"
            ) from None
        waiting.clear()

    def __len__(self) -> int:
        return len(self._first) + len(self._ends) - 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Records) and len(self) == len(other) and all(map(operator.eq, self, other))

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...

    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        place = range(len(self))[number]
        if place < len(self._first):
            return self._first[place]
        return next(self._read(place - len(self._first), 1))

    def __iter__(self) -> Iterator[T]:
        yield from self._first
        for place in range(0, len(self._ends) - 1, READ_AT_ONCE):
            yield from self._read(place, READ_AT_ONCE)

    def _read(self, first: int, count: int) -> Iterator[T]:
        start, stop = self._ends[first], self._ends[min(first + count, len(self._ends) - 1)]
        return map(self._decode, map(json.loads, os.pread(self._file.fileno(), stop - start, start).splitlines()))


def repeated(hashes: np.ndarray) -> np.ndarray:
    """Return the numbers, ascending, of the elements of `hashes` (n,) that are there more than once."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    return np.unique(np.concatenate([order[same], order[same + 1]]))
