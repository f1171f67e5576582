"""Splits that are computed: shares of each class by source video, and VGGSound's validation clips.

Both depend on names only: not on the order of a listing, on other files, or on the machine.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from avcil_dist.data.shard import SPLITS, Split
from avcil_dist.errors import ConfigError
from avcil_dist.seeds import derive_seed

NUM_VALIDATION = 10  # of each VGGSound class
PRIORITY: tuple[Split, ...] = ("train", "test", "val")  # of the splits of a class with fewer sources than splits


@dataclass(frozen=True)
class SplitShares:
    """The shares of train, val and test in each class; they sum to 1."""

    train: float = 0.8
    val: float = 0.1
    test: float = 0.1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Shares of a text such as `0.8,0.1,0.1`. Raises ConfigError for any other form."""
        try:
            train, val, test = (float(word) for word in text.split(","))
            shares = cls(train, val, test)
        except ValueError:
            raise ConfigError(f"--split {text}: give the shares of train, val and test, such as 0.8,0.1,0.1") from None
        numbers = (shares.train, shares.val, shares.test)
        if not all(0 <= number <= 1 for number in numbers) or not math.isclose(sum(numbers), 1, abs_tol=1e-6):
            raise ConfigError(f"--split {text}: the shares of train, val and test are at least 0 and sum to 1")
        return shares

    def of(self, split: Split) -> float:
        """The share of a split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    @property
    def wanted(self) -> tuple[Split, ...]:
        """The splits that are not empty, the most needed first."""
        return tuple(split for split in PRIORITY if self.of(split) > 0)


DEFAULT_SHARES = SplitShares()


def split_sources(clips: Iterable[tuple[str, str]], shares: SplitShares = DEFAULT_SHARES) -> dict[str, Split]:
    """The split of each source video, for clips given as (class, source).

    All clips of a source are in one split, also where they are in several classes. Within each class the sources, in
    the order of their digests, fill test and val up to their shares of the class's clips, and the rest is train. A
    class with as many sources as splits has a clip in each, unless sources that it shares with other classes prevent
    that. A class with fewer has train first, then test.
    """
    return _Assignment(clips, shares).splits


class _Assignment:
    """The splits of sources while they are chosen, and the clips of each class by split."""

    def __init__(self, clips: Iterable[tuple[str, str]], shares: SplitShares) -> None:
        self.sources: dict[str, Counter[str]] = {}  # per source its number of clips in each class
        for label, source in clips:
            self.sources.setdefault(source, Counter())[label] += 1
        self.of_class: dict[str, list[str]] = {}  # per class its sources, in the order of their digests
        order = sorted(self.sources, key=lambda source: (derive_seed(0, "split", source), source))
        for source in order:
            for label in self.sources[source]:
                self.of_class.setdefault(label, []).append(source)
        self.shares, self.splits = shares, dict[str, Split]()
        self.counts: Counter[tuple[str, Split]] = Counter()  # clips
        self.quotas = {label: self._quotas(label) for label in self.of_class}
        for source in sorted(order, key=lambda source: len(self.sources[source]) == 1):  # shared sources first
            self._put(source, self._fitting(source))
        for label in sorted(self.of_class):
            self._fill_missing(label)

    def _wanted(self, label: str) -> tuple[Split, ...]:
        """The splits that a class can have, the most needed first."""
        return self.shares.wanted[: len(self.of_class[label])]

    def _quotas(self, label: str) -> dict[Split, int]:
        """Numbers of clips of a class by split, at least 1 for each split that it can have; those of the rest: all."""
        total = sum(self.sources[source][label] for source in self.of_class[label])
        wanted = self._wanted(label)
        quotas = {split: max(1, math.floor(self.shares.of(split) * total + 0.5)) for split in wanted}
        return dict.fromkeys(SPLITS, 0) | quotas | {self._rest: total}

    @property
    def _rest(self) -> Split:
        """The split with the largest share, which takes the sources that the others do not."""
        return max(PRIORITY, key=self.shares.of)

    def _fitting(self, source: str) -> Split:
        clips = self.sources[source]
        for split in reversed(SPLITS):
            if split != self._rest and all(
                self.counts[label, split] + count <= self.quotas[label][split] for label, count in clips.items()
            ):
                return split
        return self._rest

    def _put(self, source: str, split: Split) -> None:
        before = self.splits.get(source)
        for label, count in self.sources[source].items():
            if before is not None:
                self.counts[label, before] -= count
            self.counts[label, split] += count
        self.splits[source] = split

    def _fill_missing(self, label: str) -> None:
        """Move the smallest source that can be spared into each split that the class lacks."""
        for split in self._wanted(label):
            if self.counts[label, split]:
                continue
            movable = [source for source in self.of_class[label] if self._is_spare(source)]
            if movable:
                self._put(min(movable, key=self._size), split)

    def _is_spare(self, source: str) -> bool:
        """Whether each class of the source has other clips in its split."""
        split = self.splits[source]
        return all(self.counts[label, split] > count for label, count in self.sources[source].items())

    def _size(self, source: str) -> tuple[int, int]:
        return len(self.sources[source]), self.sources[source].total()


def hold_out_validation(clips: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Of training clips (class, key), 10 a class that become validation clips: those with the smallest hashes.

    Of a class with few clips at most half become validation clips.
    """
    by_class: dict[str, list[str]] = {}
    for label, key in clips:
        by_class.setdefault(label, []).append(key)
    held_out = set()
    for label, keys in by_class.items():
        ranked = sorted(keys, key=lambda key: derive_seed(0, "validation clip", key))
        held_out |= {(label, key) for key in ranked[: min(NUM_VALIDATION, len(keys) // 2)]}
    return held_out
