"""Significance of differences over seeds: a paired t-test of the streams of equal seed and class order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_PAIRS = 3


@dataclass(frozen=True)
class PairedTest:
    """Two-sided paired t-test: the mean difference of `pairs` pairs, and p; None for fewer than MIN_PAIRS pairs."""

    pairs: int
    difference: float
    p_value: float | None


def paired_test(values: Mapping[Any, float], reference: Mapping[Any, float]) -> PairedTest:
    """Compare values by seed with those of a reference; only seeds of both count."""
    common = [key for key in values if key in reference]
    first, second = [values[key] for key in common], [reference[key] for key in common]
    difference = math.fsum(a - b for a, b in zip(first, second, strict=True)) / len(common) if common else math.nan
    if len(common) < MIN_PAIRS:
        return PairedTest(len(common), difference, None)
    if len({a - b for a, b in zip(first, second, strict=True)}) == 1:  # no deviation: t is 0/0 or infinite
        return PairedTest(len(common), difference, 1.0 if difference == 0 else 0.0)
    from scipy.stats import ttest_rel  # most of a second of imports

    return PairedTest(len(common), difference, float(ttest_rel(first, second).pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for their number (Holm 1979), in order; None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected
