"""Writer of one shard: a plain tar that `wds.WebDataset(url).decode()` reads without our code."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np
from pydantic import BaseModel, ValidationError

from avcil_dist import storage
from avcil_dist.data.clip_table import Region
from avcil_dist.data.shard import Shard, Split, check_keys
from avcil_dist.errors import ConfigError, DataError


class _ClipMetadata(BaseModel):
    """The part of a clip's metadata that the manifest repeats."""

    region: Region | None = None


def shard_url(split: Split, class_number: int, class_name: str, number: int) -> str:
    """The url of a shard, relative to the manifest's folder: `train/c003-bird_chirping-0000.tar`."""
    slug = re.sub(r"[^A-Za-z0-9]+", "_", class_name).strip("_")[:60]
    return f"{split}/c{class_number:03d}-{slug}-{number:04d}.tar"


def clip_members(data: bytes, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a clip: the bytes of its mp4, and its metadata as json."""
    return {"mp4": data, "json": _json(metadata)}


def feature_members(visual: np.ndarray, audio: np.ndarray, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of a clip's features, visual (tokens, dim) and audio (dim,), in float16.

    Raises DataError for values that float16 cannot hold.
    """
    members = {}
    for name, values in (("visual.npy", visual), ("audio.npy", audio)):
        with np.errstate(over="ignore"):
            halves = np.ascontiguousarray(values, dtype=np.float16)
        if not np.isfinite(halves).all():
            raise DataError(f"{name}: has values that are no number, or too large for float16")
        buffer = io.BytesIO()
        np.save(buffer, halves, allow_pickle=False)
        members[name] = buffer.getvalue()
    return members | {"json": _json(metadata)}


def write_shard(
    url: str, *, root: str, class_name: str, split: Split, clips: Iterable[tuple[str, dict[str, bytes]]]
) -> Shard:
    """Write clips, each a key and its members by name, as `KEY.member` files of the tar `root/url`.

    One clip is in memory at a time. Equal clips give equal bytes: owner and time of the files are fixed. Raises
    DataError for a key that WebDataset would split, a duplicate key, or clips with different members; ConfigError
    for a url that is not relative to `root`. Regions in the metadata become those of the shard.
    """
    if url.startswith(("/", "pipe:")) or "://" in url or ".." in url.split("/"):
        raise ConfigError(f"{url}: a shard's url is a plain path below the manifest's folder")
    keys: dict[str, None] = {}
    offsets: dict[str, list[int]] = {}
    sizes: dict[str, list[int]] = {}
    regions: list[Region | None] = []
    with storage.new_file(storage.join(root, url)) as file:
        target = _DigestingFile(file)
        with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for key, members in clips:
                check_keys(url, [key])
                if keys and members.keys() != offsets.keys():
                    raise DataError(f"{url}: clip {key!r} has members {sorted(members)}, the others {sorted(offsets)}")
                if key in keys:
                    raise DataError(f"{url}: clip key {key!r} is a duplicate; rename one of the two")
                keys[key] = None
                regions.append(region_of(members.get("json", b"")))
                for member, data in members.items():
                    offsets.setdefault(member, []).append(_add_file(tar, f"{key}.{member}", data, url))
                    sizes.setdefault(member, []).append(len(data))
        if not keys:
            raise DataError(f"{url}: a shard needs at least one clip")
    return Shard.of(
        url=url,
        class_name=class_name,
        split=split,
        bytes=target.size,
        sha256=target.digest.hexdigest(),
        keys=tuple(keys),
        offsets={member: np.array(values, dtype=np.int64) for member, values in offsets.items()},
        sizes={member: np.array(values, dtype=np.int64) for member, values in sizes.items()},
        regions=tuple(regions) if any(regions) else None,
    )


class _DigestingFile:
    """The file methods that a tar writer needs; computes size and sha256 of the bytes written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size


def _add_file(tar: tarfile.TarFile, name: str, data: bytes, url: str) -> int:
    """Add one file; return the offset of its first byte in the tar."""
    info = tarfile.TarInfo(name)  # its defaults are the fixed ones: time 0, owner 0, mode 644
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    try:
        tar.addfile(info, io.BytesIO(data))
    except ValueError as error:
        raise DataError(f"{url}: {name!r}: {error}; shorten the key") from None
    return int(offset)


def _json(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True).encode()


def region_of(metadata: bytes) -> Region | None:
    """The region in the metadata of a clip; None where it has none, or not four fractions."""
    if b'"region"' not in metadata:  # as in nearly all data sets, whose metadata need not be parsed
        return None
    try:
        return _ClipMetadata.model_validate_json(metadata).region
    except ValidationError:
        return None
