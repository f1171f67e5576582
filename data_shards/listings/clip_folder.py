"""A folder of clips: `FOLDER/<split>/<class>/*`, or `FOLDER/<class>/*`, split 80/10/10 by a hash of class and key.

Classes are sorted by name.
"""

from pathlib import Path

from avcil_dist.data.manifest import SPLITS
from data_shards.listings.listing import ListedClip, Listing, ListingRow, parse_split, safe_key
from data_shards.listings.splits import hashed_split

NEEDS_VIDEOS = False


def matches(path: Path) -> bool:
    """Whether it is a folder. Published lists are a folder too, and are matched before."""
    return path.is_dir()


def read(path: Path, videos: Path | None) -> Listing:
    """The files of the folder. Raises DataError for a split that is none."""
    top = _folders(path)
    has_splits = bool(top) and all(entry.name in SPLITS for entry in top)
    class_folders = [entry for split in top for entry in _folders(split)] if has_splits else top
    rows = []
    for entry in sorted(class_folders, key=lambda entry: entry.name):
        for file in sorted(file for file in entry.iterdir() if file.is_file() and not file.name.startswith(".")):
            key = safe_key(file.stem)
            split = parse_split(entry.parent.name, str(file)) if has_splits else hashed_split(entry.name, key)
            rows.append(ListingRow(entry.name, split, ListedClip(str(file), key, file.stem)))
    return Listing.from_rows(rows)


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
