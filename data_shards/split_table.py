"""Summary of a data set's splits for a terminal: clips per split and class, and the classes that a split lacks."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import SPLITS
from avcil_dist.reporting.tables import WordTable

MAX_CLASSES_NAMED = 40


def split_table(manifest: Manifest) -> WordTable:
    """Table of the clips and classes of each split, with the least, median and most clips of its classes."""
    counts = _counts(manifest)
    table = WordTable("splits")
    table.add_column("split")
    for heading in ("clips", "classes", "least", "median", "most"):
        table.add_column(heading, justify="right")
    for split in SPLITS:
        of_classes = [count for (_, of_split), count in sorted(counts.items()) if of_split == split]
        if of_classes:
            numbers = sum(of_classes), len(of_classes), min(of_classes), median(of_classes), max(of_classes)
            table.add_row(split, *(f"{number:g}" if number % 1 else str(int(number)) for number in numbers))
        else:
            table.add_row(split, "0", "0", "", "", "")
    return table


def lacking_classes(manifest: Manifest) -> list[str]:
    """One line for each split that some classes have no clip in, with the names of the classes."""
    counts, lines = _counts(manifest), []
    for split in SPLITS:
        lacking = [name for name in manifest.classes if not counts[name, split]]
        if len(lacking) == len(manifest.classes):
            lines.append(f"no class has a {_adjective(split)} clip")
        elif lacking:
            lines.append(
                f"{len(lacking)} of {len(manifest.classes)} classes have no {_adjective(split)} clip: {_named(lacking)}"
            )
    return lines


def _counts(manifest: Manifest) -> Counter[tuple[str, str]]:
    counts = Counter[tuple[str, str]]()
    for shard in manifest.shards:
        counts[shard.class_name, shard.split] += shard.count
    return counts


def _adjective(split: str) -> str:
    return {"train": "training", "val": "validation"}.get(split, split)


def _named(names: Sequence[str]) -> str:
    more = len(names) - MAX_CLASSES_NAMED
    return ", ".join(names[:MAX_CLASSES_NAMED]) + (f" and {more} more" if more > 0 else "")
