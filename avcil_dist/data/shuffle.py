"""Shuffle in a moving window, made in blocks: the memory is that of the window, not of all that is shuffled."""

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 1 << 18  # places made at a time


class PartsInOrder:
    """Clips of parts of shards, end to end. A part is a range of clip numbers, which takes no memory, or a list."""

    def __init__(self, parts: Sequence[range | np.ndarray]) -> None:
        counts = np.array([len(part) for part in parts], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._is_listed = np.array([not isinstance(part, range) for part in parts])
        lists = [part for part in parts if not isinstance(part, range)]
        self._listed = np.concatenate([np.empty(0, dtype=np.int64), *lists])
        before = np.cumsum(counts * self._is_listed) - counts  # of a list: its first place in `_listed`
        firsts = np.array([part.start if isinstance(part, range) else 0 for part in parts], dtype=np.int64)
        self._shifts = np.where(self._is_listed, before, firsts) - (self._ends - counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def clips(self, places: np.ndarray) -> np.ndarray:
        """Return the clips at these places, counted from 0."""
        numbers = np.searchsorted(self._ends, places, side="right")
        clips: np.ndarray = places + self._shifts[numbers]
        if len(self._listed):
            is_listed = self._is_listed[numbers]
            clips[is_listed] = self._listed[clips[is_listed]]
        return clips


def window_shuffle(count: int, reach: float, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield a permutation of 0 … count - 1 in blocks, that moves no element further than about `reach / 2`.

    Each number is shifted by uniform noise, reflected at the ends (which keeps the density even there), and the shifted
    numbers are sorted. A block has those below any that is still to come: all of the permutation is that of one sort.
    With a `reach` of `count` or more it is any permutation.
    """
    kind = np.int32 if count < 1 << 31 else np.int64
    if reach >= count:
        numbers = random.permutation(np.arange(count, dtype=kind))
        for first in range(0, count, BLOCK):
            yield numbers[first : first + BLOCK]
        return
    step = max(BLOCK, int(reach) // 8)
    values, places = np.empty(0), np.empty(0, dtype=kind)  # those that are not final
    for first in range(0, count, step):
        last = min(first + step, count)
        shifted = random.random(last - first)
        shifted -= 0.5
        shifted *= reach
        shifted += np.arange(first + 0.5, last)
        np.abs(shifted, out=shifted)
        np.subtract(2 * count, shifted, out=shifted, where=shifted > count)
        values, places = np.concatenate([values, shifted]), np.concatenate([places, np.arange(first, last, dtype=kind)])
        order = np.argsort(values, kind="stable")
        values, places = values[order], places[order]
        lowest = last - reach / 2 - 1  # of the values that are still to come, with room for rounding
        final = count if last == count else int(np.searchsorted(values, lowest))
        yield places[:final]
        values, places = values[final:], places[final:]
