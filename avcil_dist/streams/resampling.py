"""Uncertainty of accuracies: bootstrap over source videos, and paired tests of two streams on the same clips.

Clips of one source video are not independent, so whole videos are drawn, with replacement (cluster bootstrap: Efron and
Tibshirani 1993, chapter 8; Davison and Hinkley 1997, section 2.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avcil_dist.seeds import generator

DRAWS = 2000
LEVEL = 0.95
BLOCK = 1 << 22  # drawn videos at a time: bounds the memory, 32 MB of indices


def bootstrap_means(
    values: NDArray[np.floating], sources: Sequence[str], *, seed: int, draws: int = DRAWS
) -> NDArray[np.float64]:
    """Return the means of `values` (N, M) in each of `draws` samples of the source videos, (draws, M).

    A mean is over the clips that are drawn; NaN in `values` is a clip that a column does not cover, such as that of
    another task. A column without a drawn clip is NaN. The samples depend on `seed`, the number of videos and their
    order alone, so two calls with the same videos draw the same ones.
    """
    _, number = np.unique(np.asarray(sources), return_inverse=True)
    num_sources, is_covered = int(number.max()) + 1, ~np.isnan(values)
    sums, counts = np.zeros((2, num_sources, values.shape[1]))
    np.add.at(sums, number, np.where(is_covered, values, 0.0))
    np.add.at(counts, number, is_covered)
    random, means = generator(seed, "bootstrap"), np.empty((draws, values.shape[1]))
    block = max(1, BLOCK // num_sources)
    for first in range(0, draws, block):
        size = min(block, draws - first)
        drawn = random.integers(num_sources, size=(size, num_sources))
        cells = (np.arange(size)[:, None] * num_sources + drawn).ravel()
        times = np.bincount(cells, minlength=size * num_sources).reshape(size, num_sources).astype(float)
        total = times @ counts
        means[first : first + size] = np.divide(times @ sums, total, out=np.full_like(total, np.nan), where=total > 0)
    return means


def interval(means: NDArray[np.floating], level: float = LEVEL) -> tuple[float, float] | None:
    """Return the percentile interval of bootstrapped means (draws,), without those that are NaN; None without any."""
    known = means[~np.isnan(means)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one stream less that of another on the same clips.

    `low` and `high` bound the difference (bootstrap over source videos). `only_first` and `only_second` count the clips
    that one stream alone predicts correctly; `p_value` is McNemar's exact test of them, two-sided.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


def compare_paired(
    first: NDArray[np.bool_], second: NDArray[np.bool_], sources: Sequence[str], *, seed: int, draws: int = DRAWS
) -> PairedDifference:
    """Compare whether two streams are correct on each clip (N,). Raises ValueError without clips."""
    if not len(first) or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} predictions are not one of each per clip")
    gains = first.astype(float) - second.astype(float)
    bounds = interval(bootstrap_means(gains[:, None], sources, seed=seed, draws=draws)[:, 0])
    assert bounds is not None
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    return PairedDifference(float(gains.mean()), *bounds, only_first, only_second, mcnemar(only_first, only_second))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p of McNemar's exact test: of the clips that differ, each stream is right in half.

    It takes clips as independent; where source videos have several clips, trust the interval more (McNemar 1947).
    """
    from scipy.stats import binomtest  # most of a second of imports

    total = only_first + only_second
    return float(binomtest(only_first, total, 0.5).pvalue) if total else 1.0
