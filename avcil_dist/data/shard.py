"""Shard: one tar file as a manifest describes it, and the checks of its clips.

A shard contains clips of one split of one class.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from avcil_dist import storage
from avcil_dist.data.clip_table import KEY_ENDS, KEYS, LINE_FEED, REGION, REGION_NUMBERS, ClipTable, Region, Rows
from avcil_dist.errors import DataError
from avcil_dist.scenario import ClassName

MAX_SIZE = 1 << 53  # of a file in bytes; beyond it, JSON readers of other languages round
MAX_KEY_LENGTH = 255
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
ALL_KEYS = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}(\n[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}})*")
TAR_BLOCK = 512  # a member's bytes follow its header
MEMBERS = {"clip": ("mp4", "json"), "feature": ("visual.npy", "audio.npy", "json")}
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
ClipKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=MAX_KEY_LENGTH)]
Size = Annotated[int, Field(ge=0, lt=MAX_SIZE)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)]


class _ShardFields(BaseModel):
    """Fields of a shard in each of its forms as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(min_length=1, max_length=4096)]
    class_name: ClassName = Field(alias="class")
    split: Split
    count: Size
    bytes: Size
    sha256: Sha256


class ShardSummary(_ShardFields):
    """A shard as a manifest's JSON has it: without its clips, which are rows of a clip table.

    `members`: the names of the members of each clip. `regions`: whether the regions of its clips are listed.
    """

    members: tuple[MemberName, ...] = Field(max_length=100)
    regions: bool = False


class ShardRecord(_ShardFields):
    """A shard with its clips as JSON has it: in the result of a job of a build, and in manifests of format 1.

    `members`: offsets and sizes of each member, one of each per clip. `regions`: the part of the central square of the
    picture that makes the sound, per clip, of a data set with such regions.
    """

    keys: list[str]  # `Shard.check` checks them all at once
    members: dict[MemberName, tuple[list[Size], list[Size]]]
    regions: list[Region | None] | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: `count` clips, which are the rows of `table` from row `first` on.

    `members` are the names of the members of each clip. `has_regions`: whether the part of the picture that makes the
    sound is listed per clip. `root` is the folder of `url` where it is not the manifest's; it is never read from a
    manifest.
    """

    url: str
    class_name: str
    split: Split
    bytes: int
    sha256: str
    count: int
    members: tuple[str, ...]
    table: ClipTable
    first: int = 0
    has_regions: bool = False
    root: str | None = None

    @classmethod
    def of(
        cls,
        url: str,
        class_name: str,
        split: Split,
        bytes: int,
        sha256: str,
        keys: Sequence[str],
        offsets: Mapping[str, np.ndarray],
        sizes: Mapping[str, np.ndarray],
        regions: Sequence[Region | None] | None = None,
    ) -> "Shard":
        """Return a shard with a table of its own; `offsets[member][i]`, `sizes[member][i]`, `regions[i]`: clip i."""
        table = ClipTable.of(keys, offsets, sizes, regions)
        members, has_regions = tuple(sorted(offsets)), regions is not None
        return cls(url, class_name, split, bytes, sha256, len(keys), members, table, has_regions=has_regions)

    @classmethod
    def from_record(cls, record: ShardRecord) -> "Shard":
        """Return the shard of a record.

        Raises DataError for keys that are not unique or not allowed, and for members beyond the shard's bytes.
        """
        offsets = {name: np.array(spans[0], dtype=np.int64) for name, spans in record.members.items()}
        sizes = {name: np.array(spans[1], dtype=np.int64) for name, spans in record.members.items()}
        for name, starts in offsets.items():
            if not len(starts) == len(sizes[name]) == len(record.keys):
                raise DataError(f"{record.url}: {len(record.keys)} clips, but {len(starts)} offsets of {name}")
        if record.regions is not None and len(record.regions) != len(record.keys):
            raise DataError(f"{record.url}: {len(record.keys)} clips, but {len(record.regions)} regions")
        shard = cls.of(
            record.url,
            record.class_name,
            record.split,
            record.bytes,
            record.sha256,
            record.keys,
            offsets,
            sizes,
            record.regions,
        )
        if record.count != shard.count:
            raise DataError(f"{record.url}: count {record.count}, but {len(set(record.keys))} different keys")
        shard.check()
        return shard

    @property
    def rows(self) -> Rows:
        """The rows of its clips."""
        return Rows(self.table, self.first, self.count)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its clips."""
        return tuple(self.table.keys(self.first, self.count))

    @property
    def offsets(self) -> dict[str, np.ndarray]:
        """The offset in the tar of each member of each clip, int64, by member."""
        return {member: self._spans(member)[0] for member in self.members}

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        """The size of each member of each clip, int64, by member."""
        return {member: self._spans(member)[1] for member in self.members}

    @property
    def regions(self) -> tuple[Region | None, ...] | None:
        """The part of the picture that makes the sound of each clip, where it is known for any clip."""
        rows = range(self.first, self.first + self.count)
        return tuple(self.table.region(row) for row in rows) if self.has_regions else None

    def of_rows(self, rows: np.ndarray) -> "Shard":
        """Return the shard with the clips of these rows alone; its file, bytes and digest stay those of all."""
        if not len(rows) or np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            return replace(self, first=self.first + int(rows[:1].sum()), count=len(rows))
        return replace(self, table=self.table.select(self.first + rows), first=0, count=len(rows))

    def summary(self) -> dict[str, Any]:
        """Return the shard without its clips as plain JSON values."""
        return ({"regions": True} if self.has_regions else {}) | {
            "url": self.url,
            "class": self.class_name,
            "split": self.split,
            "count": self.count,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "members": list(self.members),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the shard with its clips as plain JSON values."""
        regions = self.regions
        known = {} if regions is None else {"regions": [region and list(region) for region in regions]}
        offsets, sizes = self.offsets, self.sizes
        members = {name: [offsets[name].tolist(), sizes[name].tolist()] for name in self.members}
        return {**self.summary(), **known, "keys": list(self.keys), "members": members}

    def check(self) -> None:
        """Check the clips. Raises DataError for keys that are not unique or not allowed, and for impossible places."""
        storage.inner_path(self.url)
        keys, ends = self.rows.piece(KEYS), self.rows.piece(KEY_ENDS)
        text = keys.tobytes()
        is_whole = self.count and (np.diff(ends, prepend=0) > 0).all() and len(text) == ends[-1]
        if not is_whole or (keys[ends - 1] != LINE_FEED[0]).any():
            raise DataError(f"{self.url}: no clip in it, or not {self.count} keys")
        names = text.decode("ascii", "replace").split("\n")[:-1]
        if len(names) != self.count:  # a key with a line feed, for `check_keys` to name
            names = [text[start : end - 1].decode("ascii", "replace") for start, end in pairwise([0, *ends.tolist()])]
        check_keys(self.url, names)
        if len(set(names)) != self.count:
            raise DataError(f"{self.url}: count {self.count}, but {len(set(names))} different keys")
        for name in self.members:
            offsets, sizes = self._spans(name)
            # no sum: it may have more than 64 bits
            if ((offsets < TAR_BLOCK) | (offsets > self.bytes) | (sizes < 0) | (sizes > self.bytes - offsets)).any():
                raise DataError(f"{self.url}: {name}: an offset or size is beyond the shard's {self.bytes} bytes")

        regions = self.rows.piece(REGION).reshape(-1, REGION_NUMBERS) if self.has_regions else np.empty((0, 1))
        if not (((regions >= 0) & (regions <= 1)).all(axis=1) | np.isnan(regions).all(axis=1)).all():
            raise DataError(f"{self.url}: a region that is not four fractions")

    def _spans(self, member: str) -> tuple[np.ndarray, np.ndarray]:
        return self.table.spans(member, np.arange(self.first, self.first + self.count))


def check_keys(where: str, keys: Sequence[str]) -> None:
    """Check clip keys. Raises DataError for a key that WebDataset would split or that is unsafe in a path."""
    joined = "\n".join(keys)
    if keys and not (joined.count("\n") == len(keys) - 1 and ALL_KEYS.fullmatch(joined)):
        wrong = next(key for key in keys if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH)
        raise DataError(f"{where}: clip key {wrong[:MAX_KEY_LENGTH]!r}; keys are letters, digits, '_' and '-'")
