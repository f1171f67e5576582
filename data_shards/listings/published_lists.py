"""The split lists that the benchmarks were published with: a folder of three pickled dicts. Nothing in them is run."""

from dataclasses import dataclass
from pathlib import Path

from avcil_dist.data.manifest import SPLITS, Split
from avcil_dist.errors import DataError
from data_shards.listings.listing import Listing, ListingRow, clean_label, refuse_shares
from data_shards.listings.pickled_dict import read_pickled_dict
from data_shards.listings.splits import SplitShares
from data_shards.listings.video_folder import VideoFolder

NEEDS_VIDEOS = True
CLASS_FILE, LABEL_FILE, NUMBER_FILE = "all_classId_vid_dict.npy", "all_id_category_dict.npy", "category_encode_dict.npy"
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
    cleaned = {name: clean_label(name, str(folder / NUMBER_FILE)) for name in numbers}
    classes = tuple(cleaned[names[number]] for number in range(len(names)))
    return PublishedLists(
        classes, {split: {key: cleaned[name] for key, name in by_class[split].items()} for split in SPLITS}
    )
