"""Significance of differences over seeds: a paired t-test of the streams of equal seed and class order."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

MIN_PAIRS = 3
Order = TypeVar("Order", bound=Hashable)  # of the classes


@dataclass(frozen=True)
class PairedTest:
    """Two-sided paired t-test: the mean difference of `pairs` pairs, and p; None for fewer than MIN_PAIRS pairs.

    `seeds_agree`: some pairs are the same for every seed; they count as one.
    """

    pairs: int
    seeds_agree: bool
    difference: float
    p_value: float | None


def paired_test(values: Mapping[tuple[int, Order], float], reference: Mapping[tuple[int, Order], float]) -> PairedTest:
    """Compare values by seed and class order with those of a reference; only keys of both count."""
    by_order: dict[Order, list[tuple[float, float]]] = {}
    for key in values:
        if key in reference:
            by_order.setdefault(key[1], []).append((values[key], reference[key]))
    # a closed-form head gives one result for every seed of a class order: more seeds are no more evidence
    pairs = [pair for found in by_order.values() for pair in (found[:1] if len(set(found)) == 1 else found)]
    seeds_agree = len(pairs) < sum(map(len, by_order.values()))
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    difference = math.fsum(a - b for a, b in pairs) / len(pairs) if pairs else math.nan
    if len(pairs) < MIN_PAIRS:
        return PairedTest(len(pairs), seeds_agree, difference, None)
    if len({a - b for a, b in pairs}) == 1:  # no deviation: t is 0/0 or infinite
        return PairedTest(len(pairs), seeds_agree, difference, 1.0 if difference == 0 else 0.0)
    from scipy.stats import ttest_rel  # most of a second of imports

    return PairedTest(len(pairs), seeds_agree, difference, float(ttest_rel(first, second).pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for their number (Holm 1979), in order; None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected
