"""Manifest: the index of a set of shards, and the only list of them; folders are never listed.

Per shard the manifest's JSON has url (relative to the manifest's folder), class, split, bytes and sha256. The clips are
in a clip table beside it (`clip_table_file.py`), in the order of the shards: per clip its key, and offset and size of
each member in the tar. The content hash of shards and clips identifies the data set in every artifact and run. It does
not depend on the format: in manifests of format 1 the JSON has the clips too.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from avcil_dist import storage
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_table import ClipTable, Region, join
from avcil_dist.data.clip_table_file import TableRecord, open_table, write_table
from avcil_dist.data.shard import MAX_SIZE, MEMBERS, Sha256, Shard, ShardRecord, ShardSummary, Split
from avcil_dist.errors import DataError
from avcil_dist.scenario import ClassName

FORMAT = 2
FORMAT_1 = re.compile(rb'"format"\s*:\s*1\b')  # no string of JSON has an unescaped quote
MAX_MANIFEST_BYTES = 4 << 30  # of format 1 some 80 million clips
CONCURRENT_REQUESTS = 16
REBUILD = "restore it, or make one with `avcil shards build`"
FeatureShape = dict[Annotated[str, Field(pattern="^(frames|positions|dim)$")], Annotated[int, Field(ge=1, le=1 << 20)]]


EncoderSetting = Annotated[
    str,
    Field(
        pattern=r"^(seed|engine\.precision|(data\.clip|model\.visual|model\.audio)(\.[A-Za-z0-9_]+)+)$", max_length=200
    ),
]
Scalar = (
    bool
    | Annotated[int, Field(gt=-MAX_SIZE, lt=MAX_SIZE)]
    | Annotated[float, Field(allow_inf_nan=False)]
    | Annotated[str, Field(max_length=4096)]
    | None
)


class EncoderRecord(BaseModel):
    """The frozen encoders that made features: their settings by dotted key, and the sha256 of their weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[EncoderSetting, Scalar | Annotated[list[Scalar], Field(max_length=100)]] = Field(max_length=100)
    sha256: dict[Literal["visual", "audio"], Sha256]


class ManifestHead(BaseModel):
    """The part of a manifest's JSON that both formats have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["clip", "feature"]
    classes: tuple[ClassName, ...]
    shape: FeatureShape
    encoders: EncoderRecord | None = None
    content_hash: str


class OldManifestRecord(ManifestHead):
    """A manifest of format 1 as its JSON has it: with the clips."""

    format: Literal[1]
    shards: list[ShardRecord]


class ManifestRecord(ManifestHead):
    """A manifest as its JSON has it. `hash` is the sha256 of the rest, which has the digest of the clip table."""

    format: Literal[2]
    shards: list[ShardSummary]
    clips: TableRecord
    content_hash: Sha256
    hash: Sha256


@dataclass(frozen=True)
class Manifest:
    """A set of shards. Clips are numbered consecutively over the shards, from 0.

    `shape` is empty for clips; for features it has frames T, positions S and dim D. `root` is the folder that shard
    urls are relative to; it is not part of the content hash. `whole_hash` is the content hash of the data set of which
    this is a part. `encoders` made the features, where that is known.
    """

    kind: Literal["clip", "feature"]
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    shape: dict[str, int]
    root: str = "."
    whole_hash: str | None = None
    encoders: EncoderRecord | None = None

    @cached_property
    def first_clips(self) -> np.ndarray:
        """Number of the first clip of each shard, and the total number of clips, (shards + 1,)."""
        return np.concatenate([[0], np.cumsum([shard.count for shard in self.shards], dtype=np.int64)])

    @cached_property
    def content_hash(self) -> str:
        """sha256 of everything but `root`: equal for equal data in any location, and for a part of it."""
        if self.whole_hash is not None:
            return self.whole_hash
        digest = hashlib.sha256()
        for part in self._json_parts():
            digest.update(part)
        return digest.hexdigest()

    def url(self, shard: int) -> str:
        """Return the url of shard number `shard`."""
        found = self.shards[shard]
        return storage.join(found.root or self.root, found.url)

    def shard_numbers(self, classes: Iterable[str], split: Split) -> list[int]:
        """Return the shards of these classes and this split, in the order of the manifest."""
        found = (self._numbers.get((name, split), ()) for name in set(classes))
        return sorted(itertools.chain.from_iterable(found))

    @cached_property
    def _numbers(self) -> dict[tuple[str, Split], list[int]]:
        numbers: dict[tuple[str, Split], list[int]] = {}
        for number, shard in enumerate(self.shards):
            numbers.setdefault((shard.class_name, shard.split), []).append(number)
        return numbers

    def clips(self, classes: Iterable[str], split: Split) -> np.ndarray:
        """Return the clip numbers of these classes and this split, in the order of the manifest."""
        ranges = [np.arange(self.first_clips[n], self.first_clips[n + 1]) for n in self.shard_numbers(classes, split)]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

    def num_clips(self, classes: Iterable[str], split: Split) -> int:
        """Return the number of `clips`."""
        return int(np.diff(self.first_clips)[self.shard_numbers(classes, split)].sum())

    def shards_of(self, clips: np.ndarray) -> np.ndarray:
        """Return the shard number of each clip."""
        return np.searchsorted(self.first_clips, clips, side="right") - 1

    def spans(self, member: str, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return offset and size of a member of each clip in its shard."""
        places = self._places
        if places.is_whole:
            return places.tables[0].spans(member, clips)
        clips = np.maximum(clips, 0)  # padding has any place
        shards = self.shards_of(clips)
        rows, numbers = clips - self.first_clips[shards] + places.first_rows[shards], places.numbers[shards]
        offsets, sizes, order = np.empty_like(rows), np.empty_like(rows), np.argsort(numbers, kind="stable")
        for own in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(own):
                offsets[own], sizes[own] = places.tables[numbers[own[0]]].spans(member, rows[own])
        return offsets, sizes

    @cached_property
    def _places(self) -> "_Places":
        tables = {id(shard.table): shard.table for shard in self.shards}
        number_of = {key: number for number, key in enumerate(tables)}
        numbers = np.array([number_of[id(shard.table)] for shard in self.shards], dtype=np.int64)
        first_rows = np.array([shard.first for shard in self.shards], dtype=np.int64)
        is_whole = len(tables) == 1 and np.array_equal(first_rows, self.first_clips[:-1])
        return _Places(tuple(tables.values()), numbers, first_rows, is_whole)

    def shard_labels(self, labels: Mapping[str, int]) -> np.ndarray:
        """Return the label of each shard's class, (shards,); -1 for a class without a label."""
        return np.array([labels.get(shard.class_name, -1) for shard in self.shards], dtype=np.int64)

    def locate(self, clip: int) -> tuple[int, int]:
        """Return the shard number of a clip, and its row in that shard."""
        shard = int(np.searchsorted(self.first_clips, clip, side="right")) - 1
        return shard, int(clip - self.first_clips[shard])

    def key(self, clip: int) -> str:
        """Return the key of a clip."""
        places = self._places
        if places.is_whole:
            return places.tables[0].key(clip)
        number, row = self.locate(clip)
        shard = self.shards[number]
        return shard.table.key(shard.first + row)

    def region(self, clip: int) -> Region | None:
        """Return the part of the picture that makes the sound of a clip; None where it is not known."""
        number, row = self.locate(clip)
        shard = self.shards[number]
        return shard.table.region(shard.first + row) if shard.has_regions else None

    def class_of(self, clip: int) -> str:
        """Return the class of a clip."""
        return self.shards[self.locate(clip)[0]].class_name

    def clip_numbers(self, class_name: str, keys: Sequence[str]) -> np.ndarray:
        """Return the numbers of a class's training clips by key. Raises DataError for an unknown key."""
        wanted, numbers = set(keys), dict[str, int]()
        for shard in self.shard_numbers([class_name], "train") if wanted else ():
            first = int(self.first_clips[shard])
            numbers |= {key: first + row for row, key in enumerate(self.shards[shard].keys) if key in wanted}
        missing = [key for key in keys if key not in numbers]
        if missing:
            raise DataError(f"{self.root}: class {class_name!r} has no clip {missing[0]!r}; is it another data set?")
        return np.array([numbers[key] for key in keys], dtype=np.int64)

    def save(self, url: str) -> None:
        """Write the clip table beside `url`, then the manifest with its content hash."""
        table = write_table(storage.parent(url), [shard.rows for shard in self.shards])
        content = self._head() | {
            "format": FORMAT,
            "shards": [shard.summary() for shard in self.shards],
            "clips": table.model_dump(),
            "content_hash": self.content_hash,
        }
        storage.write_bytes(url, _to_json(content | {"hash": storage.sha256(_to_json(content))}))

    def _head(self) -> dict[str, Any]:
        head: dict[str, Any] = {"kind": self.kind, "classes": list(self.classes), "shape": self.shape}
        if self.encoders is not None:  # manifests without it keep their hash
            head["encoders"] = self.encoders.model_dump()
        return head

    def _json_parts(self) -> Iterator[bytes]:
        """Yield the content as JSON of format 1 with sorted keys, one shard at a time to bound the memory."""
        yield _to_json(self._head() | {"format": 1, "shards": []}).removesuffix(b"]}")
        for number, shard in enumerate(self.shards):
            yield (b"," if number else b"") + _to_json(shard.to_dict())
        yield b"]}"


@dataclass(frozen=True)
class _Places:
    """Rows of the clips of each shard: the number of its table, and its first row there.

    `is_whole`: there is one table, and the number of each clip is its row there.
    """

    tables: tuple[ClipTable, ...]
    numbers: np.ndarray
    first_rows: np.ndarray
    is_whole: bool


def load_manifest(url: str, data: DataConfig | None = None) -> Manifest:
    """Read a manifest, verify its hash, and open its clip table.

    `data` has the cache of a large remote table, by default below TMPDIR. Raises DataError for a file that is not a
    manifest, was modified, or contains invalid keys.
    """
    text = storage.read_bytes(url, max_bytes=MAX_MANIFEST_BYTES)
    record: OldManifestRecord | ManifestRecord
    if FORMAT_1.search(text):
        record = storage.parse_json(text, OldManifestRecord, "a manifest of format 1", url, remedy=REBUILD)
    else:
        record = storage.parse_json(text, ManifestRecord, f"a manifest of format {FORMAT}", url, remedy=REBUILD)
    del text
    if isinstance(record, ManifestRecord) and record.hash != _hash(record):
        raise _changed(url)
    try:
        shards = _old_shards(record) if isinstance(record, OldManifestRecord) else _shards(url, record, data)
        _check_shard_list(record, shards)
    except DataError as error:
        raise DataError(f"{url}: damaged manifest: {error}; {REBUILD}") from None
    root = storage.parent(url)
    manifest = Manifest(record.kind, record.classes, shards, dict(record.shape), root, encoders=record.encoders)
    if isinstance(record, ManifestRecord):
        # the hash above covers it and the table's digest; it stays with this value, not with a changed copy of it
        vars(manifest)["content_hash"] = record.content_hash
    elif manifest.content_hash != record.content_hash:
        raise _changed(url)
    return manifest


def _hash(record: ManifestRecord) -> str:
    content = record.model_dump(mode="json", by_alias=True, exclude={"hash"}, exclude_defaults=True)
    return storage.sha256(_to_json(content))


def _changed(url: str) -> DataError:
    return DataError(f"{url}: its content does not match its hash; it was changed by hand or cut short: build it again")


def _old_shards(record: OldManifestRecord) -> tuple[Shard, ...]:
    shards = [Shard.from_record(shard) for shard in record.shards]
    table = join([shard.rows for shard in shards])
    firsts = itertools.accumulate((shard.count for shard in shards), initial=0)
    return tuple(replace(shard, table=table, first=first) for shard, first in zip(shards, firsts, strict=False))


def _shards(url: str, record: ManifestRecord, data: DataConfig | None) -> tuple[Shard, ...]:
    """Return the shards of a manifest, whose clips are verified."""
    count = sum(shard.count for shard in record.shards)

    def with_clips(table: ClipTable) -> Iterator[Shard]:
        first, lists = 0, {shard.members: shard.members for shard in record.shards}
        for shard in record.shards:
            members = lists[shard.members]  # one list for all shards
            if missing := set(members).difference(table.members):
                raise DataError(f"{record.clips.url}: no column of member {min(missing)}")
            yield Shard(
                *(shard.url, shard.class_name, shard.split, shard.bytes, shard.sha256, shard.count),
                *(members, table, first, shard.regions),
            )
            first += shard.count

    def check(table: ClipTable) -> None:
        for shard in with_clips(table):
            shard.check()

    folder = storage.parent(url)
    table = open_table(folder, record.clips, count=count, check=check, owner=record.hash, data=data)
    return tuple(with_clips(table))


def _check_shard_list(record: ManifestHead, shards: Sequence[Shard]) -> None:
    """Raise DataError for a shard that is listed twice, of an unknown class, or without the members of its kind."""
    classes = set(record.classes)
    if len(classes) != len(record.classes):
        raise DataError("a class is listed twice")
    required = set(MEMBERS[record.kind]) - {"json"}
    urls: set[str] = set()
    contents: set[tuple[str, str, str]] = set()
    for shard in shards:
        content = shard.sha256, shard.class_name, shard.split
        if shard.url in urls or content in contents:
            raise DataError(f"{shard.url}: listed twice, so its clips would count twice")
        if shard.class_name not in classes:
            raise DataError(f"{shard.url}: its class {shard.class_name!r} is none of the manifest's")
        if missing := required.difference(shard.members):
            raise DataError(f"{shard.url}: has no member {min(missing)}")
        urls.add(shard.url)
        contents.add(content)
    if (record.kind == "feature") != (len(record.shape) == 3):
        raise DataError(f"shape {record.shape}: features have frames, positions and dim, clips have none")


def _to_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def check_shards(manifest: Manifest, numbers: Iterable[int]) -> None:
    """Check that shards exist with their recorded size. Raises DataError, with the number of faults, otherwise."""

    def fault(number: int) -> str | None:
        url, expected = manifest.url(number), manifest.shards[number].bytes
        try:
            found = storage.size(url)
        except DataError as error:
            return str(error)
        return f"{url}: {found} bytes, the manifest has {expected}" if found != expected else None

    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as threads:
        faults = [line for line in threads.map(fault, numbers) if line]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}; restore the shards, or build them again")
