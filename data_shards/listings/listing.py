"""A listing: the classes of a data set in their order, and its clips in theirs. Types and checks for all readers."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from avcil_dist import storage
from avcil_dist.data.clip_table import Region
from avcil_dist.data.shard import SPLITS, Split
from avcil_dist.errors import ConfigError, DataError
from data_shards.listings.rows import Records, repeated
from data_shards.listings.splits import DEFAULT_SHARES, SplitShares, split_sources
from data_shards.listings.text_files import read_lines
from data_shards.rejections import Rejection

MP4_ENDINGS = {".mp4", ".m4v", ".mov"}
VIDEO_ENDINGS = MP4_ENDINGS | {
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".mkv", ".mpeg", ".mpg", ".mts", ".ogg", ".ogv", ".ts", ".webm", ".wmv")
}
PICTURE_ENDINGS = {".jpg", ".jpeg", ".png"}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a terminal interprets them
LABEL_LENGTH = 1000
KEY_LENGTH = 90  # a tar member's name has at most 100 characters


Cut = tuple[float, float | None]  # start and duration in seconds; duration None: to the end
WHOLE_FILE: Cut = (0.0, None)  # a cut of all of a file converts it to mp4


class TarSpan(NamedTuple):
    """Place of a member in a tar: offset and size in bytes. `version` changes with the tar."""

    url: str
    offset: int
    size: int
    version: str


class FrameSeries(NamedTuple):
    """A clip that is a folder of pictures: pictures a second, where they have no times, and the path of its wav."""

    rate: float | None = None
    sound: str | None = None


class ClipFile(NamedTuple):
    """A file that holds a clip, as a whole or as a part.

    `inside`: the file is a member of a tar, and its path is that of the tar and the name in it. `frames`: the path is
    that of a folder of pictures.
    """

    path: str
    cut: Cut | None = None
    inside: TarSpan | None = None
    frames: FrameSeries | None = None


@dataclass(frozen=True)
class ListedClip:
    """A clip: its files, its key, and the video (`source`) and second (`start`) that it begins at.

    The first of `files` that can be taken is the clip. `region`: the part of the picture that makes the sound, where it
    is known. `is_named_by_id`: the listing has an id, for which they were
    found.
    """

    files: tuple[ClipFile, ...]
    key: str
    source: str
    start: float = 0.0
    region: Region | None = None
    is_named_by_id: bool = False

    @property
    def path(self) -> str:
        """The path of the first file."""
        return self.files[0].path

    @property
    def cut(self) -> Cut | None:
        """The part of the first file that is the clip; None for all of it."""
        return self.files[0].cut


class ListingRow(NamedTuple):
    """A clip with its class and split."""

    label: str
    split: Split
    clip: ListedClip


@dataclass(frozen=True)
class Listing:
    """The classes and the clips of a data set, both ordered, and the number of files that are no videos.

    `rows` of a very large listing are those of `stored_rows`. `where`: the path or url of the listing. `rejected`:
    clips of it that have no class or no file.
    """

    classes: tuple[str, ...]
    rows: Sequence[ListingRow]
    passed_over: int = 0
    where: str = ""
    rejected: tuple[Rejection, ...] = ()

    @classmethod
    def from_rows(cls, rows: Iterable[ListingRow]) -> "Listing":
        """A listing whose classes are in order of first appearance. `rows` are read once."""
        labels = dict[str, None]()

        def seen() -> Iterator[ListingRow]:
            for row in rows:
                labels.setdefault(row.label)
                yield row

        stored = stored_rows(seen())
        return cls(tuple(labels), stored)


def stored_rows(rows: Iterable[ListingRow]) -> Sequence[ListingRow]:
    """The rows, read once; those of a very large listing are in a temporary file."""
    labels = dict[str, str]()  # one object for each class

    def encode(row: ListingRow) -> Any:
        clip = row.clip
        files = [file.path if file == ClipFile(file.path) else file for file in clip.files]
        return *row[:2], files, clip.key, clip.source, clip.start, clip.region, clip.is_named_by_id

    def decode(values: Any) -> ListingRow:
        label, split, files, key, source, start, region, is_named_by_id = values
        found = tuple(map(_clip_file, files))
        clip = ListedClip(found, key, source, start, None if region is None else _region(*region), is_named_by_id)
        return ListingRow(labels.setdefault(label, label), split, clip)

    return Records(rows, encode, decode)


def _clip_file(value: Any) -> ClipFile:
    if isinstance(value, str):
        return ClipFile(value)
    path, cut, inside, frames = value
    return ClipFile(path, cut and (cut[0], cut[1]), inside and TarSpan(*inside), frames and FrameSeries(*frames))


def _region(top: float, left: float, bottom: float, right: float) -> Region:
    return top, left, bottom, right


def split_rows(
    clips: Iterable[tuple[str, str, ListedClip]], shares: SplitShares | None, where: Path
) -> list[ListingRow]:
    """Rows of clips without a split, given as (class, source video, clip); see `split_sources`."""
    named = [(clean_label(label, str(where)), source, clip) for label, source, clip in clips]
    splits = split_sources([(label, source) for label, source, _ in named], shares or DEFAULT_SHARES)
    return [ListingRow(label, splits[source], clip) for label, source, clip in named]


def refuse_shares(shares: SplitShares | None, where: Path) -> None:
    """Raise ConfigError where shares are given for a listing that has its own splits."""
    if shares is not None:
        raise ConfigError(f"{where}: has its own splits; leave out --split")


def safe_key(name: str) -> str:
    """A file name without its ending as a clip key: `7q1E_12.09` is `7q1E_12-09`.

    A name that is too long, or has other characters than letters of ASCII, digits and `_-.`, gets a digest of it.
    """
    name = unicodedata.normalize("NFC", name)
    key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    is_lossless = len(key) <= KEY_LENGTH and re.fullmatch(r"[A-Za-z0-9_.-]+", name)
    return key if is_lossless else key_with_digest(key, name)


def key_with_digest(key: str, name: str) -> str:
    """A key with a digest of the whole name; both together are short enough."""
    digest = storage.sha256(unicodedata.normalize("NFC", name).encode(errors="surrogateescape"))
    return f"{key[: KEY_LENGTH - 13]}-{digest[:12]}"


def distinct_keys(rows: Sequence[ListingRow], root: Path) -> Iterator[ListingRow]:
    """Yield the rows, with a digest of file and interval in keys that different clips of one split of a class share.

    Files are named relative to `root`, so that the keys are the same on every machine. Rows of the same file and the
    same interval keep one key: they are duplicates.
    """
    hashes = np.fromiter((hash((label, split, clip.key)) for label, split, clip in rows), np.int64, len(rows))
    files: dict[tuple[str, Split, str], set[tuple[str, object]]] = {}  # of the few keys that may be shared
    for label, split, clip in (rows[number] for number in repeated(hashes).tolist()):
        files.setdefault((label, split, clip.key), set()).add((os.path.normpath(clip.path), clip.cut))
    for row in rows:
        clip = row.clip
        if len(files.get((row.label, row.split, clip.key), ())) > 1:
            name = f"{Path(os.path.relpath(clip.path, root)).as_posix()} {clip.cut or ''}"
            row = row._replace(clip=replace(clip, key=key_with_digest(clip.key, name)))
        yield row


def clean_label(name: str, where: str) -> str:
    """A class name without spaces around it, in Unicode's composed form. Raises DataError for no valid name."""
    label = unicodedata.normalize("NFC", name.strip())
    if not label or any("\ud800" <= character <= "\udfff" for character in label):
        raise DataError(f"{where}: class {name[:60]!r} is empty or not UTF-8; rename it")
    if CONTROL.search(label) or len(label) > LABEL_LENGTH:
        raise DataError(f"{where}: class {name[:60]!r} has control characters or is too long; rename it")
    return label


def read_class_names(path: Path) -> list[str]:
    """The class names of a text file, one per line. Raises DataError for a file that is not UTF-8."""
    lines = read_lines(path)
    return [clean_label(line, f"{path}: line {number}") for number, line in lines if line.strip()]


def parse_split(name: str, where: str) -> Split:
    """The split called `name`. Raises DataError, naming `where`, for any other name."""
    for split in get_args(Split):
        if name.strip() == split:
            return split
    raise DataError(f"{where}: split {name!r} is none of {', '.join(SPLITS)}")
