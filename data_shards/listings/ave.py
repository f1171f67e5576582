"""AVE's `Annotations.txt`, split by the three lists beside it where all are there, otherwise within each class.

AVE's files are the clips. StartTime and EndTime are those of the event within the clip, so nothing is cut.
"""

from collections.abc import Iterator
from pathlib import Path

from avcil_dist.data.shard import Split
from avcil_dist.errors import DataError
from data_shards.listings.listing import (
    Listing,
    ListingRow,
    clean_label,
    refuse_shares,
    split_rows,
)
from data_shards.listings.splits import SplitShares
from data_shards.listings.text_files import first_row, read_lines
from data_shards.listings.video_folder import VideoFolder

NEEDS_VIDEOS = True
HEADER = "Category&VideoID&Quality&StartTime&EndTime"
SPLIT_FILES: dict[Split, str] = {"train": "trainSet.txt", "val": "valSet.txt", "test": "testSet.txt"}


def matches(path: Path) -> bool:
    """Whether the file begins with AVE's header."""
    return "&".join(first_row(path)).startswith(HEADER)


def read(path: Path, videos: Path | None, shares: SplitShares | None) -> Listing:
    """The annotated clips. Raises DataError for a faulty line."""
    folder = VideoFolder(path, videos)
    files = {split: path.parent / name for split, name in SPLIT_FILES.items()}
    splits: dict[tuple[str, str], Split] = {}
    if all(file.is_file() for file in files.values()):
        refuse_shares(shares, path)
        splits = {(label, video): split for split, file in files.items() for label, video in _lines(file)}
    clips = {(label, video): folder.whole_video(video) for label, video in _lines(path)}
    if splits:
        listed = [ListingRow(name[0], splits[name], clip) for name, clip in clips.items() if name in splits]
        return Listing.from_rows(listed)
    return Listing.from_rows(split_rows(((label, video, clip) for (label, video), clip in clips.items()), shares, path))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Class and video of each line but the header and empty lines."""
    for number, line in read_lines(path):
        fields = line.strip().split("&")
        if fields == [""] or fields[0] == HEADER.split("&")[0]:
            continue
        if len(fields) != 5:
            raise DataError(f"{path}: line {number}: not {HEADER}")
        yield clean_label(fields[0], f"{path}: line {number}"), fields[1].strip()
