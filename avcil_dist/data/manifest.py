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
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from avcil_dist import storage
from avcil_dist.errors import DataError

FORMAT = 1
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
MEMBERS = {"clip": ("mp4", "json"), "feature": ("visual.npy", "audio.npy", "json")}
Split = Literal["train", "val", "test"]
CONCURRENT_REQUESTS = 16
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Shard:
    """One tar file. `offsets[member][i]` and `sizes[member][i]` locate the member of clip i."""

    url: str
    class_name: str
    split: Split
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    offsets: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]

    @property
    def count(self) -> int:
        """Number of clips in the shard."""
        return len(self.keys)

    def to_dict(self) -> dict[str, Any]:
        """Return the shard as plain JSON values."""
        return {
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
    def from_dict(cls, values: dict[str, Any]) -> "Shard":
        """The inverse of `to_dict`."""
        return cls(
            url=values["url"],
            class_name=values["class"],
            split=values["split"],
            bytes=values["bytes"],
            sha256=values["sha256"],
            keys=tuple(values["keys"]),
            offsets={name: np.asarray(spans[0], dtype=np.int64) for name, spans in values["members"].items()},
            sizes={name: np.asarray(spans[1], dtype=np.int64) for name, spans in values["members"].items()},
        )


@dataclass(frozen=True)
class Manifest:
    """A set of shards. Clips are numbered consecutively over the shards, from 0.

    `shape` is empty for clips; for features it has frames T, positions S and dim D. `root` is the folder that shard
    urls are relative to; it is not part of the content hash.
    """

    kind: Literal["clip", "feature"]
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    shape: dict[str, int]
    root: str = "."

    @cached_property
    def first_clips(self) -> np.ndarray:
        """Number of the first clip of each shard, and the total number of clips, (shards + 1,)."""
        return np.concatenate([[0], np.cumsum([shard.count for shard in self.shards], dtype=np.int64)])

    @cached_property
    def content_hash(self) -> str:
        """sha256 of everything but `root`: equal for equal data in any location."""
        digest = hashlib.sha256()
        for part in self._json_parts():
            digest.update(part)
        return digest.hexdigest()

    def url(self, shard: int) -> str:
        """Return the url of shard number `shard`."""
        return storage.join(self.root, self.shards[shard].url)

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
        yield _to_json(head).removesuffix(b"]}")
        for number, shard in enumerate(self.shards):
            yield (b"," if number else b"") + _to_json(shard.to_dict())
        yield b"]}"


def load_manifest(url: str) -> Manifest:
    """Read a manifest and verify its content hash.

    Raises DataError for a file that is not a manifest, was modified, or contains invalid keys.
    """
    document = storage.read_json(url)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{url}: not a manifest of format {FORMAT}; make one with `avcil shards build`")
    try:
        manifest = Manifest(
            kind=document["kind"],
            classes=tuple(document["classes"]),
            shards=tuple(Shard.from_dict(shard) for shard in document["shards"]),
            shape=dict(document["shape"]),
            root=storage.parent(url),
        )
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{url}: damaged manifest: {error!r}") from None
    if manifest.content_hash != document.get("content_hash"):
        raise DataError(
            f"{url}: its content does not match its hash; it was changed by hand or cut short: build it again"
        )
    check_keys(url, (key for shard in manifest.shards for key in shard.keys))
    return manifest


def _to_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def check_keys(where: str, keys: Iterable[str]) -> None:
    """Check clip keys. Raises DataError for a key that WebDataset would split or that is unsafe in a path."""
    for key in keys:
        if not KEY_PATTERN.fullmatch(key):
            raise DataError(f"{where}: clip key {key!r}; keys are letters, digits, '_' and '-'")


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
