"""Exemplar memory: the keys of the exemplars of each class. The clips themselves stay in the shards.

Pure: selection is a function of keys and seed, or of features, independent of ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avcil_dist.seeds import generator

DECIMALS = 6


@dataclass(frozen=True)
class ExemplarMemory:
    """Keys of the exemplars of each class, by class name, the most important first."""

    keys: Mapping[str, tuple[str, ...]]

    @property
    def count(self) -> int:
        """Number of exemplars of all classes."""
        return sum(len(keys) for keys in self.keys.values())

    def to_dict(self) -> dict[str, list[str]]:
        """Return the memory as plain JSON values, classes in their order of arrival."""
        return {name: list(keys) for name, keys in self.keys.items()}

    def update(self, ranked: Mapping[str, Sequence[str]], size: int) -> "ExemplarMemory":
        """Return the memory after a step with the new classes of `ranked` (name to keys, the best first).

        Every class keeps its first `size // classes` exemplars; a class with fewer clips keeps them all.
        """
        share = quota(size, len(self.keys) + len(ranked))
        return ExemplarMemory({name: tuple(keys[:share]) for name, keys in {**self.keys, **ranked}.items()})


EMPTY_MEMORY = ExemplarMemory({})


def quota(size: int, num_classes: int) -> int:
    """Return the number of exemplars per class, rounded down: all classes together never exceed `size`."""
    return size // num_classes


def random_order(name: str, clips: np.ndarray, seed: int) -> np.ndarray:
    """Return the clips of a class in a random order that depends only on its name and the seed."""
    return clips[generator(seed, "memory", name).permutation(len(clips))]


def herding_order(features: np.ndarray, count: int) -> list[int]:
    """Return the rows of `features` (clips, D) whose running mean is closest to the mean of all rows, the best first.

    At most `count` rows are selected, without replacement, on features of unit norm; ties select the first row.
    Source: Welling 2009, Rebuffi et al. 2017 (iCaRL), algorithm 4.
    """
    units = unit_rows(features)
    mean, total = units.sum(axis=0) / max(1, len(units)), np.zeros(units.shape[1])
    remaining = np.ones(len(units), dtype=bool)
    selected: list[int] = []
    for number in range(1, min(count, len(units)) + 1):
        distance = np.square(units - (number * mean - total)).sum(axis=1)
        best = int(np.where(remaining, distance.round(DECIMALS), np.inf).argmin())
        selected.append(best)
        remaining[best] = False
        total += units[best]
    return selected


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Return the rows with unit norm in float64, rounded to digits that agree on all machines; zero rows stay zero."""
    exact = features.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return (exact / np.where(lengths > 0, lengths, 1)).round(DECIMALS)
