"""The memory: exemplars of old classes, as keys. The clips themselves stay in the shards.

Pure: selection is a function of keys and seed, or of features, independent of ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avcil_dist.seeds import generator

DECIMALS = 6


@dataclass(frozen=True)
class ExemplarMemory:
    """Class name to the keys of its exemplars, in order of importance."""

    keys: Mapping[str, tuple[str, ...]]

    @property
    def count(self) -> int:
        """Exemplars in all."""
        return sum(len(keys) for keys in self.keys.values())

    def to_dict(self) -> dict[str, list[str]]:
        """The memory as plain JSON values, classes in the order they were learnt."""
        return {name: list(keys) for name, keys in self.keys.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Sequence[str]]) -> "ExemplarMemory":
        """The inverse of `to_dict`."""
        return cls({name: tuple(keys) for name, keys in record.items()})

    def update(self, ranked: Mapping[str, Sequence[str]], size: int) -> "ExemplarMemory":
        """The memory after a step that brought the classes of `ranked` (name to keys, the most wanted first).

        Every class gets `size // classes` and keeps its first ones; a class with fewer clips gives
        what it has.
        """
        share = quota(size, len(self.keys) + len(ranked))
        return ExemplarMemory({name: tuple(keys[:share]) for name, keys in {**self.keys, **ranked}.items()})


EMPTY_MEMORY = ExemplarMemory({})


def quota(size: int, num_classes: int) -> int:
    """Exemplars a class."""
    return size // num_classes


def random_order(name: str, keys: Sequence[str], seed: int) -> list[str]:
    """A class's keys in an order that depends on its name and the seed alone."""
    return [keys[i] for i in generator(seed, "memory", name).permutation(len(keys))]


def herding_order(features: np.ndarray, count: int) -> list[int]:
    """The rows of `features` (clips, D) whose running mean stays closest to the mean of all; at most `count`.

    Unit-norm features, picked without replacement, the best first; of equal ones the first row.
    Source: Welling 2009, Rebuffi et al. 2017 (iCaRL), algorithm 4.
    """
    units = unit_rows(features)
    mean, total = units.sum(axis=0) / max(1, len(units)), np.zeros(units.shape[1])
    left = np.ones(len(units), dtype=bool)
    picked: list[int] = []
    for number in range(1, min(count, len(units)) + 1):
        distance = np.square(units - (number * mean - total)).sum(axis=1)
        best = int(np.where(left, distance.round(DECIMALS), np.inf).argmin())
        picked.append(best)
        left[best] = False
        total += units[best]
    return picked


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of unit length in float64, without the digits in which one machine differs from another; zero stays zero."""
    exact = features.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return (exact / np.where(lengths > 0, lengths, 1)).round(DECIMALS)
