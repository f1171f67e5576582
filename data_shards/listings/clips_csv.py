"""A csv with the header `path,label,split` and any of `source,start,duration`; paths are relative to the csv.

Classes are in order of first appearance. A row with a start or a duration is a cut of its file.
"""

import re
from pathlib import Path

from avcil_dist.errors import DataError
from data_shards.listings.listing import ListedClip, Listing, ListingRow, first_row, open_csv, parse_split, safe_key

NEEDS_VIDEOS = False
COLUMNS, OPTIONAL_COLUMNS = {"path", "label", "split"}, {"source", "start", "duration"}


def matches(path: Path) -> bool:
    """Whether the first row of the file names the three columns."""
    return set(first_row(path)) >= COLUMNS


def read(path: Path, videos: Path | None) -> Listing:
    """The rows of the csv. Raises DataError for an unknown column or a faulty row."""
    rows = []
    with open_csv(path) as lines:
        _, header = next(lines)
        unknown = sorted(set(header) - COLUMNS - OPTIONAL_COLUMNS)
        if unknown:
            raise DataError(
                f"{path}: its header has {unknown[0]!r}; columns are path,label,split,start,duration,source"
            )
        for line, values in lines:
            if not values:
                continue
            where, row = f"{path}: line {line}", dict(zip(header, values, strict=False))
            if len(values) > len(header) or not all(row.get(column, "").strip() for column in COLUMNS):
                raise DataError(f"{where}: needs a path, a label and a split")
            clip = _clip(path.parent / row["path"], row, where)
            rows.append(ListingRow(row["label"], parse_split(row["split"], where), clip))
    return Listing.from_rows(rows)


def _clip(file: Path, row: dict[str, str], where: str) -> ListedClip:
    start, duration = _seconds(row.get("start"), where), _seconds(row.get("duration"), where)
    source = row.get("source") or file.stem
    if start is None and duration is None:
        return ListedClip(str(file), safe_key(file.stem), source)
    begin = start or 0.0
    end = "end" if duration is None else f"{round((begin + duration) * 1000)}"
    key = safe_key(f"{file.stem}_{round(begin * 1000)}_{end}")
    return ListedClip(str(file), key, source, begin, (begin, duration))


def _seconds(text: str | None, where: str) -> float | None:
    if not text:
        return None
    if not re.fullmatch(r"\d+(\.\d*)?", text.strip()):
        raise DataError(f"{where}: {text!r} is not a number of seconds")
    return float(text)
