"""Which clip is in which class and split: the benchmarks' published lists, and VGGSound's validation clips."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from avcil_dist.data.manifest import SPLITS, Split
from avcil_dist.errors import DataError
from avcil_dist.seeds import derive_seed
from data_shards.unpickle import read_pickled_dict

CLASS_FILE, LABEL_FILE, NUMBER_FILE = "all_classId_vid_dict.npy", "all_id_category_dict.npy", "category_encode_dict.npy"
OFFICIAL_FILES = (CLASS_FILE, LABEL_FILE, NUMBER_FILE)
NUM_VALIDATION = 10  # of each VGGSound class


@dataclass(frozen=True)
class SplitLists:
    """The classes in the lists' own order, and per split each clip's key and class."""

    classes: tuple[str, ...]
    labels: dict[Split, dict[str, str]]


def is_official(folder: Path) -> bool:
    """Whether the folder holds the published lists of a benchmark."""
    return all((folder / name).is_file() for name in OFFICIAL_FILES)


def read_official(folder: Path) -> SplitLists:
    """The three lists that the benchmarks were published with (pickled dicts; nothing in them is run).

    `category_encode_dict` has the number of each class, `all_id_category_dict` the class of each clip by split,
    `all_classId_vid_dict` the clips of each number by split. Raises DataError for lists that are missing, of
    another form, or do not agree.
    """
    numbers = read_pickled_dict(folder / NUMBER_FILE)
    names = {number: name for name, number in numbers.items()}
    if sorted(names) != list(range(len(numbers))) or not all(isinstance(name, str) for name in numbers):
        raise DataError(f"{folder / NUMBER_FILE}: its classes are not numbered 0, 1, 2, …")
    labels = read_pickled_dict(folder / LABEL_FILE)
    clips = read_pickled_dict(folder / CLASS_FILE)
    try:
        by_class = {
            split: {key: names[number] for number, keys in clips[split].items() for key in keys} for split in SPLITS
        }
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder / CLASS_FILE}: not clips by split and class number ({error!r})") from None
    for split in SPLITS:
        if labels.get(split) != by_class[split]:
            raise DataError(f"{folder}: {LABEL_FILE} and {CLASS_FILE} do not agree on the {split} clips")
    return SplitLists(tuple(names[number] for number in range(len(names))), {split: labels[split] for split in SPLITS})


def hold_out_validation(clips: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Of training clips (class, key), 10 a class that become validation clips: those whose hashes are smallest.

    A class with few clips gives at most half of them.
    """
    by_class: dict[str, list[str]] = {}
    for label, key in clips:
        by_class.setdefault(label, []).append(key)
    held = set()
    for label, keys in by_class.items():
        ranked = sorted(keys, key=lambda key: derive_seed(0, "validation clip", key))
        held |= {(label, key) for key in ranked[: min(NUM_VALIDATION, len(keys) // 2)]}
    return held


def hashed_split(label: str, key: str) -> Split:
    """A split by a hash of class and key: 80 % train, 10 % val, 10 % test."""
    tenth = derive_seed(0, "split", label, key) % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"
