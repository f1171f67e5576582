"""The split lists that the benchmarks were published with: a folder of three pickled dicts. Nothing in them is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import StrictInt, StrictStr, TypeAdapter, ValidationError

from avcil_dist import storage
from avcil_dist.data.shard import SPLITS, Split
from avcil_dist.errors import DataError
from data_shards.listings.listing import Listing, ListingRow, clean_label, refuse_shares
from data_shards.listings.pickled_dict import read_pickled_dict
from data_shards.listings.splits import SplitShares
from data_shards.listings.video_folder import VideoFolder

NEEDS_VIDEOS = True
CLASS_FILE, LABEL_FILE, NUMBER_FILE = "all_classId_vid_dict.npy", "all_id_category_dict.npy", "category_encode_dict.npy"
T = TypeVar("T")
PUBLISHED_FILES = (CLASS_FILE, LABEL_FILE, NUMBER_FILE)


@dataclass(frozen=True)
class PublishedLists:
    """The classes in the lists' own order, and per split the class of each clip key."""

    classes: tuple[str, ...]
    labels: dict[Split, dict[str, str]]


def matches(path: Path) -> bool:
    """Whether the folder holds the published lists of a benchmark."""
    return all((path / name).is_file() for name in PUBLISHED_FILES)


def read(path: Path, videos: Path | None, shares: SplitShares | None) -> Listing:
    """The clips of the lists, in the lists' order."""
    refuse_shares(shares, path)
    folder = VideoFolder(path, videos)
    lists = read_published_lists(path)
    rows = [
        ListingRow(label, split, folder.clip_of_key(key))
        for split in SPLITS
        for key, label in lists.labels[split].items()
    ]
    return Listing(lists.classes, tuple(rows))


def read_published_lists(folder: Path) -> PublishedLists:
    """The three lists of a benchmark.

    `category_encode_dict` has the number of each class, `all_id_category_dict` the class of each clip by split,
    `all_classId_vid_dict` the clips of each number by split. Raises DataError for lists that are missing, of
    another form, or contradict each other.
    """
    numbers = _typed(folder / NUMBER_FILE, dict[StrictStr, StrictInt], "classes with their numbers")
    names = {number: name for name, number in numbers.items()}
    if sorted(names) != list(range(len(numbers))):
        raise DataError(f"{folder / NUMBER_FILE}: its classes are not numbered 0, 1, 2, …")
    labels = _typed(folder / LABEL_FILE, dict[Split, dict[StrictStr, StrictStr]], "the class of each clip by split")
    clips = _typed(folder / CLASS_FILE, dict[Split, dict[StrictInt, list[StrictStr]]], "clips by split and number")
    by_class: dict[Split, dict[str, str]] = {split: {} for split in SPLITS}
    for split, by_number in clips.items():
        for number, keys in by_number.items():
            if number not in names:
                raise DataError(f"{folder / CLASS_FILE}: class number {number} is not in {NUMBER_FILE}")
            by_class[split] |= dict.fromkeys(keys, names[number])
    for split in SPLITS:
        if labels.get(split) != by_class[split]:
            raise DataError(f"{folder}: {LABEL_FILE} and {CLASS_FILE} do not agree on the {split} clips")
    cleaned = {name: clean_label(name, str(folder / NUMBER_FILE)) for name in numbers}
    classes = tuple(cleaned[names[number]] for number in range(len(names)))
    return PublishedLists(
        classes, {split: {key: cleaned[name] for key, name in by_class[split].items()} for split in SPLITS}
    )


def _typed(path: Path, kind: type[T], what: str) -> T:
    """Return the dict in a file as a `kind`. Raises DataError for other content."""
    content = read_pickled_dict(path)
    try:
        value: T = TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise DataError(f"{path}: not {what} ({storage.describe(error)})") from None
    return value
