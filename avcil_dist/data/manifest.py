"""Manifest: the index of a set of shards, and the only list of them; folders are never listed.

A shard contains clips of one split of one class. Per shard the manifest has url (relative to the manifest's folder),
class, split, bytes and sha256; per clip its key, and offset and size of each member in the tar. Its content hash
identifies the data set in every artifact and run.
"""

import hashlib
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
from avcil_dist.errors import DataError
from avcil_dist.scenario import ClassName

FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 30  # some 80 million clips
MAX_SIZE = 1 << 53  # of a file in bytes; beyond it, JSON readers of other languages round
MAX_KEY_LENGTH = 255
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
ALL_KEYS = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}(\n[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}})*")
TAR_BLOCK = 512  # a member's bytes follow its header
MEMBERS = {"clip": ("mp4", "json"), "feature": ("visual.npy", "audio.npy", "json")}
Split = Literal["train", "val", "test"]
CONCURRENT_REQUESTS = 16
REBUILD = "restore it, or make one with `avcil shards build`"
SPLITS: tuple[Split, ...] = ("train", "val", "test")
ClipKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=MAX_KEY_LENGTH)]
Size = Annotated[int, Field(ge=0, lt=MAX_SIZE)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Region = tuple[Fraction, Fraction, Fraction, Fraction]  # top, left, bottom, right, as fractions
FeatureShape = dict[Annotated[str, Field(pattern="^(frames|positions|dim)$")], Annotated[int, Field(ge=1, le=1 << 20)]]


EncoderSetting = Annotated[
    str, Field(pattern=r"^(seed|(data\.clip|model\.visual|model\.audio)(\.[A-Za-z0-9_]+)+)$", max_length=200)
]
Scalar = (
    bool
    | Annotated[int, Field(gt=-MAX_SIZE, lt=MAX_SIZE)]
    | Annotated[float, Field(allow_inf_nan=False)]
    | Annotated[str, Field(max_length=4096)]
    | None
)


class ShardRecord(BaseModel):
    """A shard as the manifest's JSON has it.

    `members`: offsets and sizes of each member, one of each per clip. `regions`: the part of the central square of the
    picture that makes the sound, per clip, of a data set with such regions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(min_length=1, max_length=4096)]
    class_name: ClassName = Field(alias="class")
    split: Split
    count: Size
    bytes: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    keys: list[str]  # `check_keys` checks them all at once
    members: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)], tuple[list[Size], list[Size]]]
    regions: list[Region | None] | None = None


class EncoderRecord(BaseModel):
    """The frozen encoders that made features: their settings by dotted key, and the sha256 of their weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[EncoderSetting, Scalar | Annotated[list[Scalar], Field(max_length=100)]] = Field(max_length=100)
    sha256: dict[Literal["visual", "audio"], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


class ManifestRecord(BaseModel):
    """A manifest as its JSON has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    kind: Literal["clip", "feature"]
    classes: tuple[ClassName, ...]
    shape: FeatureShape
    encoders: EncoderRecord | None = None
    shards: list[ShardRecord]
    content_hash: str


@dataclass(frozen=True)
class Shard:
    """One tar file. `offsets[member][i]` and `sizes[member][i]` locate the member of clip i.

    `regions[i]` is the part of the picture that makes the sound of clip i, where it is known for any clip.
    `root` is the folder of `url` where it is not the manifest's; it is never read from a manifest.
    """

    url: str
    class_name: str
    split: Split
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    offsets: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]
    root: str | None = None
    regions: tuple[Region | None, ...] | None = None

    @property
    def count(self) -> int:
        """Number of clips in the shard."""
        return len(self.keys)

    def of_rows(self, rows: np.ndarray) -> "Shard":
        """Return the shard with the clips of these rows alone; its file, bytes and digest stay those of all."""
        if len(rows) == self.count:
            return self
        return replace(
            self,
            keys=tuple(self.keys[row] for row in rows),
            offsets={member: values[rows] for member, values in self.offsets.items()},
            sizes={member: values[rows] for member, values in self.sizes.items()},
            regions=None if self.regions is None else tuple(self.regions[row] for row in rows),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the shard as plain JSON values."""
        regions = {} if self.regions is None else {"regions": [region and list(region) for region in self.regions]}
        return regions | {
            "url": self.url,
            "class": self.class_name,
            "split": self.split,
            "count": self.count,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "keys": list(self.keys),
            "members": {name: [self.offsets[name].tolist(), self.sizes[name].tolist()] for name in self.offsets},
        }

    @classmethod
    def from_record(cls, record: ShardRecord) -> "Shard":
        """Return the shard of a record.

        Raises DataError for keys that are not unique or not allowed, and for members beyond the shard's bytes.
        """
        shard = cls(
            url=record.url,
            class_name=record.class_name,
            split=record.split,
            bytes=record.bytes,
            sha256=record.sha256,
            keys=tuple(record.keys),
            offsets={name: np.array(spans[0], dtype=np.int64) for name, spans in record.members.items()},
            sizes={name: np.array(spans[1], dtype=np.int64) for name, spans in record.members.items()},
            regions=None if record.regions is None else tuple(record.regions),
        )
        storage.inner_path(record.url)
        check_keys(record.url, shard.keys)
        if not len(set(shard.keys)) == shard.count == record.count or not shard.count:
            raise DataError(f"{record.url}: count {record.count}, but {len(set(shard.keys))} different keys")
        if shard.regions is not None and len(shard.regions) != shard.count:
            raise DataError(f"{record.url}: {shard.count} clips, but {len(shard.regions)} regions")
        for name, offsets in shard.offsets.items():
            sizes = shard.sizes[name]
            if not len(offsets) == len(sizes) == shard.count:
                raise DataError(f"{record.url}: {shard.count} clips, but {len(offsets)} offsets of {name}")
            if (offsets < TAR_BLOCK).any() or (offsets + sizes > shard.bytes).any():
                raise DataError(f"{record.url}: {name}: an offset or size is beyond the shard's {shard.bytes} bytes")
        return shard


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
        wanted = set(classes)
        return [
            number for number, shard in enumerate(self.shards) if shard.split == split and shard.class_name in wanted
        ]

    def clips(self, classes: Iterable[str], split: Split) -> np.ndarray:
        """Return the clip numbers of these classes and this split, in the order of the manifest."""
        ranges = [np.arange(self.first_clips[n], self.first_clips[n + 1]) for n in self.shard_numbers(classes, split)]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

    def shards_of(self, clips: np.ndarray) -> np.ndarray:
        """Return the shard number of each clip."""
        return np.searchsorted(self.first_clips, clips, side="right") - 1

    def spans(self, member: str, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return offset and size of a member of each clip in its shard."""
        offsets, sizes = self._spans[member]
        return offsets[clips], sizes[clips]

    @cached_property
    def _spans(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            member: (
                np.concatenate([shard.offsets[member] for shard in self.shards]),
                np.concatenate([shard.sizes[member] for shard in self.shards]),
            )
            for member in MEMBERS[self.kind]
            if all(member in shard.offsets for shard in self.shards)
        }

    def shard_labels(self, labels: Mapping[str, int]) -> np.ndarray:
        """Return the label of each shard's class, (shards,); -1 for a class without a label."""
        return np.array([labels.get(shard.class_name, -1) for shard in self.shards], dtype=np.int64)

    def locate(self, clip: int) -> tuple[int, int]:
        """Return the shard number of a clip, and its row in that shard."""
        shard = int(np.searchsorted(self.first_clips, clip, side="right")) - 1
        return shard, int(clip - self.first_clips[shard])

    def key(self, clip: int) -> str:
        """Return the key of a clip."""
        shard, row = self.locate(clip)
        return self.shards[shard].keys[row]

    def region(self, clip: int) -> Region | None:
        """Return the part of the picture that makes the sound of a clip; None where it is not known."""
        shard, row = self.locate(clip)
        regions = self.shards[shard].regions
        return None if regions is None else regions[row]

    def class_of(self, clip: int) -> str:
        """Return the class of a clip."""
        return self.shards[self.locate(clip)[0]].class_name

    def clip_numbers(self, class_name: str, keys: Sequence[str]) -> np.ndarray:
        """Return the numbers of a class's training clips by key. Raises DataError for an unknown key."""
        numbers = {self.key(clip): clip for clip in self.clips([class_name], "train")}
        missing = [key for key in keys if key not in numbers]
        if missing:
            raise DataError(f"{self.root}: class {class_name!r} has no clip {missing[0]!r}; is it another data set?")
        return np.array([numbers[key] for key in keys], dtype=np.int64)

    def save(self, url: str) -> None:
        """Write the manifest with its content hash."""
        first, *others = self._json_parts()
        with_hash = b'{"content_hash":' + json.dumps(self.content_hash).encode() + b"," + first.removeprefix(b"{")
        storage.write_bytes(url, b"".join([with_hash, *others]))

    def _json_parts(self) -> Iterator[bytes]:
        """Yield the content as JSON with sorted keys, one shard at a time to bound the memory."""
        head = {"format": FORMAT, "kind": self.kind, "classes": list(self.classes), "shape": self.shape, "shards": []}
        if self.encoders is not None:  # manifests without it keep their hash
            head["encoders"] = self.encoders.model_dump()
        yield _to_json(head).removesuffix(b"]}")
        for number, shard in enumerate(self.shards):
            yield (b"," if number else b"") + _to_json(shard.to_dict())
        yield b"]}"


def load_manifest(url: str) -> Manifest:
    """Read a manifest and verify its content hash.

    Raises DataError for a file that is not a manifest, was modified, or contains invalid keys.
    """
    what = f"a manifest of format {FORMAT}"
    record = storage.read_json(url, ManifestRecord, what, remedy=REBUILD, max_bytes=MAX_MANIFEST_BYTES)
    try:
        shards = tuple(map(Shard.from_record, record.shards))
        _check_shard_list(record, shards)
    except DataError as error:
        raise DataError(f"{url}: damaged manifest: {error}; {REBUILD}") from None
    root = storage.parent(url)
    manifest = Manifest(record.kind, record.classes, shards, dict(record.shape), root, encoders=record.encoders)
    if manifest.content_hash != record.content_hash:
        raise DataError(
            f"{url}: its content does not match its hash; it was changed by hand or cut short: build it again"
        )
    return manifest


def _check_shard_list(record: ManifestRecord, shards: Sequence[Shard]) -> None:
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
        if missing := required - shard.offsets.keys():
            raise DataError(f"{shard.url}: has no member {min(missing)}")
        urls.add(shard.url)
        contents.add(content)
    if (record.kind == "feature") != (len(record.shape) == 3):
        raise DataError(f"shape {record.shape}: features have frames, positions and dim, clips have none")


def _to_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def check_keys(where: str, keys: Sequence[str]) -> None:
    """Check clip keys. Raises DataError for a key that WebDataset would split or that is unsafe in a path."""
    joined = "\n".join(keys)
    if keys and not (joined.count("\n") == len(keys) - 1 and ALL_KEYS.fullmatch(joined)):
        wrong = next(key for key in keys if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH)
        raise DataError(f"{where}: clip key {wrong[:MAX_KEY_LENGTH]!r}; keys are letters, digits, '_' and '-'")


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
