"""VGGSound's listings, without header: `vggsound.csv`, or its own `train.csv` and `test.csv`.

`vggsound.csv` has youtube id, start second, label, and train or test; the own lists have file and label. Where both
own lists are, both are read, whichever is given. Ten training clips a class become validation clips.
"""

from pathlib import Path

from avcil_dist.errors import DataError
from data_shards.listings.listing import (
    Listing,
    ListingRow,
    clean_label,
    parse_split,
    refuse_shares,
)
from data_shards.listings.splits import SplitShares, hold_out_validation
from data_shards.listings.text_files import csv_rows, first_row, is_number, parse_seconds
from data_shards.listings.video_folder import VideoFolder

NEEDS_VIDEOS = True
OWN_LISTS = ("train.csv", "test.csv")


def matches(path: Path) -> bool:
    """Whether the first row has the form of one of the two."""
    first = first_row(path)
    return _has_seconds(first) or (len(first) == 2 and path.name in OWN_LISTS)


def read(path: Path, videos: Path | None, shares: SplitShares | None) -> Listing:
    """The clips of the lists. Raises DataError for a faulty row."""
    refuse_shares(shares, path)
    read_rows = _rows_with_seconds if _has_seconds(first_row(path)) else _rows_of_own_lists
    return Listing.from_rows(_with_validation(read_rows(path, VideoFolder(path, videos))))


def _has_seconds(row: list[str]) -> bool:
    return len(row) == 4 and is_number(row[1].strip())


def _rows_with_seconds(path: Path, videos: VideoFolder) -> list[ListingRow]:
    rows = []
    for where, row in csv_rows(path, columns=4):
        video, start, label, split = (text.strip() for text in row)
        if not is_number(start):
            raise DataError(f"{where}: start {start[:40]!r} is not a number of seconds")
        clip = videos.clip_at(video, int(parse_seconds(start, where)))
        rows.append(ListingRow(clean_label(label, where), parse_split(split, where), clip))
    return rows


def _rows_of_own_lists(path: Path, videos: VideoFolder) -> list[ListingRow]:
    rows = []
    for name in OWN_LISTS:
        if (path.parent / name).is_file():
            for where, (file, label) in csv_rows(path.parent / name, columns=2):
                split = parse_split(Path(name).stem, name)
                clip = videos.clip_of_key(Path(file.strip()).stem)
                rows.append(ListingRow(clean_label(label, where), split, clip))
    return rows


def _with_validation(rows: list[ListingRow]) -> list[ListingRow]:
    held_out = hold_out_validation((row.label, row.clip.key) for row in rows if row.split == "train")
    return [
        row._replace(split="val") if row.split == "train" and (row.label, row.clip.key) in held_out else row
        for row in rows
    ]
