"""What a user has, as a list of clips: a csv, a folder, VGGSound's or AVE's annotations, published split lists.

Files are found and named here; nothing is opened. A list that names videos by id needs the folder of the files.
"""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from avcil_dist import storage
from avcil_dist.data.manifest import SPLITS, Split
from avcil_dist.errors import ConfigError, DataError
from data_shards.splits import hashed_split, hold_out_validation, is_official, read_official

COLUMNS, MORE_COLUMNS = {"path", "label", "split"}, {"source", "start", "duration"}
KEY_LENGTH = 90  # the tar format wants names below 100 characters
VIDEO_ENDINGS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".ts"}
VGGSOUND_SECONDS = 10
AVE_HEADER = "Category&VideoID&Quality&StartTime&EndTime"
AVE_SPLITS: dict[Split, str] = {"train": "trainSet.txt", "val": "valSet.txt", "test": "testSet.txt"}
VGGSOUND_LISTS = ("train.csv", "test.csv")


@dataclass(frozen=True)
class ListedClip:
    """A file, and the video (`source`) and second (`start`) that it begins at.

    With `cut` (start, duration in seconds; no duration: to the end), the clip is a part of the file.
    """

    path: str
    key: str
    source: str
    start: float = 0.0
    cut: tuple[float, float | None] | None = None


class Row(NamedTuple):
    """A clip of a source."""

    label: str
    split: Split
    clip: ListedClip


@dataclass(frozen=True)
class Source:
    """The classes in their order, and the clips in theirs."""

    classes: tuple[str, ...]
    rows: tuple[Row, ...]


def read_listing(path: Path, videos: Path | None = None) -> Source:
    """The clips of a source; `videos` is the folder of files of a source that names videos by id.

    Which of these it is shows in its form:
    - a csv with the header `path,label,split` and any of `source,start,duration`; paths relative to the csv
    - a folder `SOURCE/<split>/<class>/*`, or `SOURCE/<class>/*`, split 80/10/10 by a hash of class and key
    - `vggsound.csv` (youtube id, start second, label, train or test; no header)
    - VGGSound's own lists `train.csv` and `test.csv` (file, label; no header): either, both are read where both are
    - AVE's `Annotations.txt`, split by the lists beside it where they are, else by hash
    - a folder of published split lists, see `splits.read_official`
    The classes of a folder are sorted, of official lists theirs, else in order of first appearance. VGGSound's
    validation clips are 10 a class, held out of train. Raises DataError, naming file and line; ConfigError when
    `videos` is missing, or given to a source that has paths.
    """
    if path.is_dir() and not is_official(path):
        return _without_videos(path, videos, _folder_rows(path))
    if not path.exists():
        raise DataError(f"{path}: missing; give a csv with the header path,label,split, or a folder of clips")
    first = [] if path.is_dir() else _first_row(path)
    if first and set(first) >= COLUMNS:
        return _without_videos(path, videos, _csv_rows(path))
    if path.is_dir():
        return _official(path, _VideoFolder(path, videos))
    if first and "&".join(first).startswith(AVE_HEADER):
        return _source(path, _ave_rows(path, _VideoFolder(path, videos)))
    if len(first) == 4 and first[1].strip().isdigit():
        return _source(path, _with_validation(_vggsound_rows(path, _VideoFolder(path, videos))))
    if len(first) == 2 and path.name in VGGSOUND_LISTS:
        return _source(path, _with_validation(_vggsound_list_rows(path, _VideoFolder(path, videos))))
    raise DataError(f"{path}: its header is {','.join(first)!r}; make it path,label,split")


def safe_key(name: str) -> str:
    """A file name without its ending as a clip key: `7q1E_12.09` is `7q1E_12-09`."""
    key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    return key if len(key) <= KEY_LENGTH else f"{key[: KEY_LENGTH - 13]}-{storage.sha256(name.encode())[:12]}"


class _VideoFolder:
    """The files of a folder tree by what they are usually called: `ID_000030`, `ID_30000_40000`, `ID`."""

    def __init__(self, source: Path, videos: Path | None) -> None:
        if videos is None:
            raise ConfigError(f"{source}: names videos by id; say where the files are with --videos FOLDER")
        if not videos.is_dir():
            raise DataError(f"{videos}: no such folder")
        self.folder = videos
        self._files: dict[str, Path] = {}
        self._spans: dict[str, Path] = {}
        for path in sorted(self._walk()):
            self._files.setdefault(path.stem, path)
            span = re.fullmatch(r"(.+)_\d+_\d+", path.stem)
            if span:
                self._spans.setdefault(span[1], path)

    def _walk(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.folder, followlinks=True):
            yield from (Path(folder, name) for name in names if Path(name).suffix.lower() in VIDEO_ENDINGS)

    def at_second(self, video: str, start: int) -> ListedClip:
        """The ten seconds from `start` on: a file of their own, or a part of the whole video's file."""
        end = start + VGGSOUND_SECONDS
        key = f"{video}_{start:06d}"
        for name in (key, f"{video}_{start * 1000}_{end * 1000}"):
            if name in self._files:
                return ListedClip(str(self._files[name]), safe_key(key), video, float(start))
        if video in self._files:
            cut = float(start), float(VGGSOUND_SECONDS)
            return ListedClip(str(self._files[video]), safe_key(key), video, float(start), cut)
        return ListedClip(str(self.folder / f"{key}.mp4"), safe_key(key), video, float(start))

    def whole(self, video: str) -> ListedClip:
        """The file of a video: `ID`, or, as Kinetics' files are called, `ID_000012_000022`."""
        path = self._files.get(video) or self._spans.get(video) or self.folder / f"{video}.mp4"
        return ListedClip(str(path), safe_key(video), video)

    def named(self, key: str) -> ListedClip:
        """The clip of a key that is a video's id, or, as VGGSound's are, id and second: `ID_000030`."""
        found = re.fullmatch(r"(.+)_(\d{6})", key)
        return self.at_second(found[1], int(found[2])) if found else self.whole(key)


def _source(path: Path, rows: list[Row]) -> Source:
    if not rows:
        raise DataError(f"{path}: no clips in it")
    return Source(tuple(dict.fromkeys(row.label for row in rows)), tuple(rows))


def _without_videos(path: Path, videos: Path | None, rows: list[Row]) -> Source:
    if videos is not None:
        raise ConfigError(f"{path}: has the paths of its clips; leave out --videos")
    return _source(path, rows)


def _first_row(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return next(csv.reader(file), [])


def _csv_rows(path: Path) -> list[Row]:
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        unknown = sorted(set(reader.fieldnames or ()) - COLUMNS - MORE_COLUMNS)
        if unknown:
            raise DataError(
                f"{path}: its header has {unknown[0]!r}; columns are path,label,split,start,duration,source"
            )
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if None in row or not all(row[column] for column in COLUMNS):
                raise DataError(f"{where}: needs a path, a label and a split")
            clip = path.parent / row["path"]
            start, duration = _seconds(row.get("start"), where), _seconds(row.get("duration"), where)
            source = row.get("source") or clip.stem
            if start is None and duration is None:
                found = ListedClip(str(clip), safe_key(clip.stem), source)
            else:
                begin = start or 0.0
                end = "end" if duration is None else f"{round((begin + duration) * 1000)}"
                key = safe_key(f"{clip.stem}_{round(begin * 1000)}_{end}")
                found = ListedClip(str(clip), key, source, begin, (begin, duration))
            rows.append(Row(row["label"], _split(row["split"], where), found))
    return rows


def _seconds(text: str | None, where: str) -> float | None:
    if not text:
        return None
    if not re.fullmatch(r"\d+(\.\d*)?", text.strip()):
        raise DataError(f"{where}: {text!r} is not a number of seconds")
    return float(text)


def _folder_rows(folder: Path) -> list[Row]:
    top = _folders(folder)
    has_splits = bool(top) and all(entry.name in SPLITS for entry in top)
    class_folders = [entry for split in top for entry in _folders(split)] if has_splits else top
    rows = []
    for entry in sorted(class_folders, key=lambda entry: entry.name):
        for path in sorted(path for path in entry.iterdir() if path.is_file() and not path.name.startswith(".")):
            key = safe_key(path.stem)
            split = _split(entry.parent.name, str(path)) if has_splits else hashed_split(entry.name, key)
            rows.append(Row(entry.name, split, ListedClip(str(path), key, path.stem)))
    return rows


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _vggsound_rows(path: Path, videos: _VideoFolder) -> list[Row]:
    rows = []
    for where, row in _lines(path, columns=4):
        video, start, label, split = (text.strip() for text in row)
        if not start.isdigit():
            raise DataError(f"{where}: start {start!r} is not a number of seconds")
        rows.append(Row(label, _split(split, where), videos.at_second(video, int(start))))
    return rows


def _vggsound_list_rows(path: Path, videos: _VideoFolder) -> list[Row]:
    """The lists beside each other: clips of `train.csv` are train, of `test.csv` test."""
    rows = []
    for name in VGGSOUND_LISTS:
        if (path.parent / name).is_file():
            for _, (file, label) in _lines(path.parent / name, columns=2):
                rows.append(Row(label, _split(Path(name).stem, name), videos.named(Path(file).stem)))
    return rows


def _lines(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """Where each row stands, and the row."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if len(row) != columns or not all(text.strip() for text in row):
                raise DataError(f"{where}: has not {columns} columns")
            yield where, row


def _with_validation(rows: list[Row]) -> list[Row]:
    held = hold_out_validation((row.label, row.clip.key) for row in rows if row.split == "train")
    return [
        row._replace(split="val") if row.split == "train" and (row.label, row.clip.key) in held else row for row in rows
    ]


def _ave_rows(path: Path, videos: _VideoFolder) -> list[Row]:
    """AVE's files are the clips: StartTime and EndTime say when within the clip its event is, so nothing is cut."""
    lists = {split: path.parent / name for split, name in AVE_SPLITS.items()}
    listed: dict[tuple[str, str], Split] = {}
    if all(file.is_file() for file in lists.values()):
        listed = {(label, video): split for split, file in lists.items() for label, video in _ave_lines(file)}
    rows = {}
    for label, video in _ave_lines(path):
        if listed and (label, video) not in listed:
            continue
        clip = videos.whole(video)
        rows[label, video] = Row(label, listed.get((label, video)) or hashed_split(label, clip.key), clip)
    return list(rows.values())


def _ave_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Class and video of each line; the header, where there is one, is left out."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            words = line.strip().split("&")
            if words == [""] or words[0] == AVE_HEADER.split("&")[0]:
                continue
            if len(words) != 5:
                raise DataError(f"{path}: line {number}: not {AVE_HEADER}")
            yield words[0], words[1]


def _official(folder: Path, videos: _VideoFolder) -> Source:
    lists = read_official(folder)
    rows = [Row(label, split, videos.named(key)) for split in SPLITS for key, label in lists.labels[split].items()]
    return Source(lists.classes, tuple(rows))


def _split(name: str, where: str) -> Split:
    for split in get_args(Split):
        if name == split:
            return split
    raise DataError(f"{where}: split {name!r} is none of {', '.join(SPLITS)}")
