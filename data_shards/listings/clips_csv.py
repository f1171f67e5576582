"""A csv with the header `path,label` and any of `split,source,start,duration,region`; paths are relative to the csv.

A path is that of a video file, or of a folder of pictures. Classes are in order of first appearance. A row with a start
or a duration is a cut of its file. A region is the part of the picture that makes the sound: top, left, bottom and
right as fractions of the picture, such as `0 0.5 0.5 1`; metrics then have the share of the attention on it. Without
the column `split` the clips are split within each class by source video: `source`, or the id in the file's name, or
the file.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from avcil_dist.data.clip_table import Region
from avcil_dist.errors import DataError
from data_shards.listings.frame_folders import frame_folder, is_frame_folder
from data_shards.listings.listing import (
    VIDEO_ENDINGS,
    ClipFile,
    ListedClip,
    Listing,
    ListingRow,
    parse_split,
    refuse_shares,
    safe_key,
    split_rows,
)
from data_shards.listings.splits import SplitShares
from data_shards.listings.text_files import first_row, open_csv, parse_seconds
from data_shards.listings.video_names import source_video

NEEDS_VIDEOS = False
COLUMNS, OPTIONAL_COLUMNS = {"path", "label"}, {"split", "source", "start", "duration", "region"}


def matches(path: Path) -> bool:
    """Whether the first row of the file names both columns."""
    return set(first_row(path)) >= COLUMNS


def read(path: Path, videos: Path | None, shares: SplitShares | None) -> Listing:
    """The rows of the csv. Raises DataError for an unknown column or a faulty row."""
    with open_csv(path) as lines:
        _, header = next(lines)
        has_splits = "split" in header
        needed = COLUMNS | ({"split"} if has_splits else set())
        if has_splits:
            refuse_shares(shares, path)
        unknown = sorted(set(header) - COLUMNS - OPTIONAL_COLUMNS)
        if unknown:
            raise DataError(
                f"{path}: its header has {unknown[0]!r}; columns are path,label,split,start,duration,source,region"
            )
        rows = _rows(path, header, needed, lines)
        if has_splits:
            return Listing.from_rows(
                ListingRow(row["label"], parse_split(row["split"], where), _clip(path.parent / row["path"], row, where))
                for where, row in rows
            )
        clips = [
            (
                row["label"],
                row.get("source") or _source(row["path"]),
                _clip(path.parent / row["path"], row, where),
            )
            for where, row in rows
        ]
    return Listing.from_rows(split_rows(clips, shares, path))


def _rows(
    path: Path, header: list[str], needed: set[str], lines: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows by column, each with its file and line for error messages."""
    for line, values in lines:
        if not values:
            continue
        where, row = f"{path}: line {line}", dict(zip(header, values, strict=False))
        if len(values) > len(header) or not all(row.get(column, "").strip() for column in needed):
            raise DataError(f"{where}: needs a path, a label{' and a split' if 'split' in needed else ''}")
        yield where, row


def _source(path: str) -> str:
    """The source video of a file: the id in its name; of a name without one, the file, whatever its folder's name."""
    stem = Path(path).stem
    return video if (video := source_video(stem)) != stem else os.path.normpath(path)


def _clip(file: Path, row: dict[str, str], where: str) -> ListedClip:
    start, duration = _seconds(row.get("start"), where), _seconds(row.get("duration"), where)
    is_series = file.suffix.lower() not in VIDEO_ENDINGS and is_frame_folder(file)
    clip_file = frame_folder(file) if is_series else ClipFile(str(file))
    source, region = row.get("source") or file.stem, _region(row.get("region"), where)
    if start is None and duration is None:
        return ListedClip((clip_file,), safe_key(file.stem), source, region=region)
    begin = start or 0.0
    end = "end" if duration is None else f"{round((begin + duration) * 1000)}"
    key = safe_key(f"{file.stem}_{round(begin * 1000)}_{end}")
    return ListedClip((clip_file._replace(cut=(begin, duration)),), key, source, begin, region)


def _region(text: str | None, where: str) -> Region | None:
    if not (text or "").strip():
        return None
    try:
        top, left, bottom, right = map(float, str(text).split())
    except ValueError:
        raise DataError(f"{where}: region {str(text)[:60]!r} is not four numbers: top left bottom right") from None
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise DataError(f"{where}: region {text!r}: top < bottom and left < right must be fractions of the picture")
    return top, left, bottom, right


def _seconds(text: str | None, where: str) -> float | None:
    return parse_seconds(text, where) if text else None
