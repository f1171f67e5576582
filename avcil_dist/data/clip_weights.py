"""Sampling weights of clips: the frequencies with which a method's clips are drawn. Pure functions of numbers."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClipWeights:
    """Weight of each clip of a step, none negative: an exemplar has its own, another clip that of its shard.

    `of_shard` (shards,); `exemplars` (E,) are clip numbers, ascending, `of_exemplar` (E,) their weights.
    """

    of_shard: np.ndarray
    exemplars: np.ndarray
    of_exemplar: np.ndarray

    @classmethod
    def of(cls, of_shard: np.ndarray, exemplars: np.ndarray, weights: np.ndarray) -> "ClipWeights":
        """Return the weights of shards, and of exemplars in any order."""
        order = np.argsort(exemplars)
        return cls(of_shard, exemplars[order], weights[order])

    def lookup(self, clips: np.ndarray, shards: np.ndarray) -> np.ndarray:
        """Return the weights (n,) of these clips (n,), which are in these shards (n,)."""
        weights = self.of_shard[shards]
        if len(self.exemplars):
            places = np.minimum(np.searchsorted(self.exemplars, clips), len(self.exemplars) - 1)
            weights = np.where(self.exemplars[places] == clips, self.of_exemplar[places], weights)
        return weights


def draw(weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return as many of the positions of `weights` (n,) as there are, ascending, in proportion to their weights.

    Position i is drawn n · w_i / Σ w times, rounded up or down (systematic sampling). All weights 0: each once.
    """
    count, ends = len(weights), np.cumsum(weights)
    if not count or not ends[-1] > 0:
        return np.arange(count)
    ticks = (np.arange(count) + random.random()) * (ends[-1] / count)
    last = np.flatnonzero(weights)[-1]  # the last tick may be rounded up to the end
    return np.minimum(np.searchsorted(ends, ticks, side="right"), last)
