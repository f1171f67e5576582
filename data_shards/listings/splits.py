"""Splits that are computed from keys: a hashed 80/10/10 split, and VGGSound's validation clips."""

from collections.abc import Iterable

from avcil_dist.data.manifest import Split
from avcil_dist.seeds import derive_seed

NUM_VALIDATION = 10  # of each VGGSound class


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


def hashed_split(label: str, key: str) -> Split:
    """A split by a hash of class and key: 80 % train, 10 % val, 10 % test."""
    tenth = derive_seed(0, "split", label, key) % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"
