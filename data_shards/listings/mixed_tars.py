"""Listing of WebDataset tars in which classes are mixed: `KEY.mp4` (or another video) with `KEY.json`, `cls` or `txt`.

One pass over the headers of a tar makes its index: per sample the class, the split, the source video, and the place of
the video in the tar. Indexes are saved, so that an interrupted run, and other parts of it, do not read a tar again.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from json import dumps
from pathlib import Path, PurePosixPath
from typing import Any

from avcil_dist import storage
from avcil_dist.data.shard import Split
from avcil_dist.errors import DataError
from data_shards.listings.listing import (
    MP4_ENDINGS,
    VIDEO_ENDINGS,
    WHOLE_FILE,
    ClipFile,
    ListedClip,
    Listing,
    ListingRow,
    TarSpan,
    distinct_keys,
    safe_key,
    split_rows,
    stored_rows,
)
from data_shards.listings.splits import SplitShares
from data_shards.listings.tar_labels import SPLIT_WORDS, label_of_text, label_of_value, read_json, split_of_value
from data_shards.listings.video_names import source_video
from data_shards.rejections import ClipRejectedError, Rejection
from data_shards.tar_files import indexed_members
from data_shards.tar_stream import Member
from data_shards.workers import Progress

TEXTS = ("json", "cls", "txt")
SOURCE_FIELDS = ("source", "video_id", "youtube_id", "videoid", "ytid", "url")
MAX_CLIP_BYTES = 1 << 31
MAX_FIELDS_NAMED = 12
MAX_SPLIT_LENGTH = 60
MAX_INDEX_BYTES = 1 << 30
READERS = 16  # tars that are indexed at a time: latency dominates
BY_PATH = "path"  # the split is a word in the path of the tar
FORMAT = 2


@dataclass(frozen=True)
class SampleRules:
    """Places of class and source video in the samples.

    `label`: a field of the json (`a.b` for one within another), or `cls` or `txt`; None: `label` of the json, or cls,
    or the txt of a sample without json. `source`: a field; None: the first of the usual ones, or the key. `classes`:
    the names of class numbers.
    """

    label: str | None = None
    source: str | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A sample of a tar; `videos` are names, offsets and sizes. `fault`: kind and description, for no usable one.

    `split` is the word of its json, which may be none of ours: it does not count where splits are given.
    """

    key: str
    label: str = ""
    split: str | None = None
    source: str | None = None
    start: float = 0.0
    videos: tuple[tuple[str, int, int], ...] = ()
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class TarIndex:
    """The samples of a tar, in its order, and the version of the tar that they are of."""

    version: str
    samples: tuple[Sample, ...] = field(default=())


def read_mixed_tars(
    urls: Sequence[str],
    rules: SampleRules,
    split: SplitShares | str | None = None,
    *,
    saved: str | None = None,
    first: int = 0,
    progress: Progress | None = None,
) -> Listing:
    """The listing of the samples of tars.

    `split`: shares, or `BY_PATH`; None: the splits in the json, or the usual shares where no json has one. `saved`: the
    folder of saved indexes. `first`: the number of the tar to begin with, so that parts that start together share the
    work. Raises DataError for tars that cannot be read, and without any sample.
    """
    indexes = _read_indexes(urls, rules, saved, first, progress)
    rows, clips, rejected = list[ListingRow](), list[tuple[str, str, ListedClip]](), list[Rejection]()
    by_json = split is None and any(sample.split in SPLIT_WORDS for index in indexes for sample in index.samples)
    root = _common_folder(urls)
    for url, index in zip(urls, indexes, strict=True):
        of_path = _split_of_path(url) if split == BY_PATH else None
        for sample in index.samples:
            chosen, fault = of_path, sample.fault
            if fault is None and (by_json or (split is None and sample.split)):
                chosen, fault = _split_of_json(sample)
            if fault is not None:
                kind: Any = fault[0]
                rejected.append(Rejection(f"{url}/{sample.key}", sample.label, chosen or "", kind, fault[1]))
                continue
            clip = _clip(url, index.version, sample)
            if chosen is not None:
                rows.append(ListingRow(sample.label, chosen, clip))
            else:
                clips.append((sample.label, _source_of(sample, os.path.relpath(url, root)), clip))
    shares = split if isinstance(split, SplitShares) else None
    rows += split_rows(clips, shares, Path(urls[0]))
    if not rows and not rejected:
        raise DataError(f"{urls[0]}: no sample in the tars; a sample is KEY.mp4 with KEY.json, KEY.cls or KEY.txt")
    listing = Listing.from_rows(rows)
    named = dict.fromkeys([*(name for name in rules.classes if name in listing.classes), *listing.classes])
    keyed = stored_rows(distinct_keys(rows, Path(root)))
    return Listing(tuple(named), keyed, where=urls[0], rejected=tuple(rejected))


def _read_indexes(
    urls: Sequence[str], rules: SampleRules, saved: str | None, first: int, progress: Progress | None
) -> list[TarIndex]:
    """The index of each tar. Raises DataError, with the number of faults, where tars cannot be read."""
    indexes, faults = dict[str, TarIndex](), list[str]()
    order = [*urls[first:], *urls[:first]]

    def read(url: str) -> TarIndex | DataError:
        try:
            return _read_index(url, rules, saved)
        except DataError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        for number, (url, index) in enumerate(zip(order, pool.map(read, order), strict=True), 1):
            if isinstance(index, DataError):
                faults.append(str(index))
            else:
                indexes[url] = index
            if progress:
                progress(number, len(order))
    if faults:
        more = f" (and {len(faults) - 1} more tars cannot be read)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}")
    return [indexes[url] for url in urls]


def _read_index(url: str, rules: SampleRules, saved: str | None) -> TarIndex:
    version = storage.version(url)
    name = storage.sha256(dumps([FORMAT, url, asdict(rules)]).encode())
    place = storage.join(saved, f"{name}.json") if saved else None
    if place and storage.exists(place):
        try:
            index = storage.read_json(place, TarIndex, "an index of a tar", max_bytes=MAX_INDEX_BYTES)
        except DataError:
            pass  # of another version of this program: it is made again
        else:
            if index.version == version:
                return index
    index = TarIndex(version, tuple(_samples(url, rules)))
    if place:
        storage.write_json(place, asdict(index))
    return index


def _samples(url: str, rules: SampleRules) -> list[Sample]:
    """The samples of a tar; members of one key may lie apart."""
    groups: dict[str, dict[str, Member]] = {}
    twice: set[str] = set()
    for member in indexed_members(url, TEXTS):
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")  # as WebDataset splits it: at the first dot
        key = f"{folder}/{stem}" if folder else stem
        if ending in groups.setdefault(key, {}):
            twice.add(key)
        groups[key][ending] = member
    samples = []
    for key, members in groups.items():
        try:
            if key in twice:
                raise ClipRejectedError("duplicate", "its key comes twice in the tar")
            samples.append(_sample(key, members, rules))
        except DataError as error:
            kind = error.kind if isinstance(error, ClipRejectedError) else "corrupt"
            samples.append(Sample(key, fault=(kind, str(error))))
    return samples


def _sample(key: str, members: dict[str, Member], rules: SampleRules) -> Sample:
    endings = sorted(ending for ending in members if _suffix(ending) in VIDEO_ENDINGS)
    videos = [members[ending] for ending in sorted(endings, key=lambda ending: _suffix(ending) not in MP4_ENDINGS)]
    if not videos:
        raise ClipRejectedError("format", f"no video among its members ({', '.join(sorted(members))[:100]})")
    if max(member.size for member in videos) > MAX_CLIP_BYTES:
        raise ClipRejectedError("format", f"more than {MAX_CLIP_BYTES >> 30} GiB")
    texts = {}
    for ending in TEXTS:
        if ending in members:
            content = members[ending].content
            if content is None:
                raise DataError(f"its {ending} has {members[ending].size} bytes, too many for metadata")
            texts[ending] = content
    values = read_json(texts["json"], f"{key}.json") if "json" in texts else {}
    start = values.get("start", 0.0)
    return Sample(
        key,
        label=_label(key, texts, values, rules),
        split=str(values["split"])[:MAX_SPLIT_LENGTH] if values.get("split") is not None else None,
        source=_source_field(values, rules),
        start=float(start) if isinstance(start, int | float) and 0 <= start < 1e9 else 0.0,
        videos=tuple((member.name, member.offset, member.size) for member in videos),
    )


def _label(key: str, texts: dict[str, bytes], values: dict[str, Any], rules: SampleRules) -> str:
    ending = rules.label if rules.label in ("cls", "txt") else None
    if rules.label is None and "label" not in values:
        ending = "cls" if "cls" in texts else "txt" if "txt" in texts and "json" not in texts else None
    if ending is not None:
        if ending not in texts:
            raise ClipRejectedError("format", f"no {ending} with its class")
        return label_of_text(texts[ending], rules.classes, f"{key}.{ending}")
    name = rules.label or "label"
    value = _field(values, name)
    if value is None:
        fields = ", ".join(sorted(values)[:MAX_FIELDS_NAMED]) or "none"
        raise ClipRejectedError("format", f"no class: no field {name!r} in its json (fields: {fields}); give --label")
    return label_of_value(value, rules.classes, f"{key}.json")


def _source_field(values: dict[str, Any], rules: SampleRules) -> str | None:
    names = (rules.source,) if rules.source else SOURCE_FIELDS
    found = (_field(values, name) for name in names)
    text = next((str(value) for value in found if isinstance(value, str | int) and str(value).strip()), None)
    return text and text.strip()[:300]


def _field(values: dict[str, Any], name: str) -> Any:
    """The field of a json; `a.b` is field b of field a, unless there is a field of that name."""
    if name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    inner = values.get(first)
    return _field(inner, rest) if dot and isinstance(inner, dict) else None


def _clip(url: str, version: str, sample: Sample) -> ListedClip:
    files = tuple(
        ClipFile(
            f"{url}/{name}",
            None if _suffix(name) in MP4_ENDINGS else WHOLE_FILE,
            TarSpan(url, offset, size, version),
        )
        for name, offset, size in sample.videos
    )
    stem = sample.key.rpartition("/")[2]
    return ListedClip(files, safe_key(stem), sample.source or stem, sample.start)


def _source_of(sample: Sample, tar: str) -> str:
    """The source video: of a key that is a mere number in its tar, the sample itself."""
    stem = sample.key.rpartition("/")[2]
    return sample.source or (video if (video := source_video(stem)) != stem else f"{tar}/{sample.key}")


def _split_of_json(sample: Sample) -> tuple[Split | None, tuple[str, str] | None]:
    """The split that the json of a sample has, or the fault that it has none."""
    if sample.split is None:
        return None, ("format", "no split in its json, while others have one; give --split")
    try:
        return split_of_value(sample.split, f"{sample.key}.json"), None
    except DataError as error:
        return None, ("corrupt", f"{error}; give --split")


def _split_of_path(url: str) -> Split:
    """The split that the path of a tar names; its file name counts first, then the nearest folder."""
    for part in reversed(PurePosixPath(url).parts):
        for word in re.split("[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    raise DataError(f"{url}: its path has no word train, val, validation or test")


def _common_folder(urls: Sequence[str]) -> str:
    """The folder that holds all tars, so that names below it are the same on every machine."""
    folders = [storage.parent(url) for url in urls]
    is_mixed = len({folder.startswith("/") for folder in folders}) > 1
    return "." if is_mixed else os.path.commonpath(folders)


def _suffix(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"
