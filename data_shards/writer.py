"""One shard: a plain tar that `wds.WebDataset(url).decode()` reads without our code."""

import io
import re
import tarfile
from collections.abc import Iterable

import numpy as np

from avcil_dist import storage
from avcil_dist.data.manifest import Shard, Split, check_keys
from avcil_dist.errors import ConfigError, DataError


def shard_url(split: Split, class_number: int, class_name: str, number: int) -> str:
    """Where a shard lies below the manifest's folder: `train/c003-bird_chirping-0000.tar`."""
    slug = re.sub(r"[^A-Za-z0-9]+", "_", class_name).strip("_")[:60]
    return f"{split}/c{class_number:03d}-{slug}-{number:04d}.tar"


def write_shard(
    url: str, *, root: str, class_name: str, split: Split, clips: Iterable[tuple[str, dict[str, bytes]]]
) -> Shard:
    """Write clips, each a key and its members by name, as `KEY.member` files of the tar `root/url`.

    Equal clips give equal bytes: owner and time of the files are fixed. Raises DataError for a key that
    WebDataset would split, a key that comes twice, or clips that differ in their members; ConfigError for a
    url that is not relative to `root`.
    """
    if url.startswith(("/", "pipe:")) or "://" in url or ".." in url.split("/"):
        raise ConfigError(f"{url}: a shard's url is a plain path below the manifest's folder")
    keys: list[str] = []
    offsets: dict[str, list[int]] = {}
    sizes: dict[str, list[int]] = {}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in clips:
            check_keys(url, [key])
            if keys and members.keys() != offsets.keys():
                raise DataError(f"{url}: clip {key!r} has members {sorted(members)}, the others {sorted(offsets)}")
            keys.append(key)
            for member, data in members.items():
                offsets.setdefault(member, []).append(_add_file(tar, f"{key}.{member}", data, url))
                sizes.setdefault(member, []).append(len(data))
    if not keys:
        raise DataError(f"{url}: a shard needs at least one clip")
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{url}: clip key {twice!r} comes twice; rename one of the two")
    content = buffer.getvalue()
    storage.write_bytes(storage.join(root, url), content)
    return Shard(
        url=url,
        class_name=class_name,
        split=split,
        bytes=len(content),
        sha256=storage.sha256(content),
        keys=tuple(keys),
        offsets={member: np.array(values, dtype=np.int64) for member, values in offsets.items()},
        sizes={member: np.array(values, dtype=np.int64) for member, values in sizes.items()},
    )


def _add_file(tar: tarfile.TarFile, name: str, data: bytes, url: str) -> int:
    """Add one file; the offset of its first byte in the tar."""
    info = tarfile.TarInfo(name)  # its defaults are the fixed ones: time 0, owner 0, mode 644
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    try:
        tar.addfile(info, io.BytesIO(data))
    except ValueError as error:
        raise DataError(f"{url}: {name!r}: {error}; shorten the key") from None
    return int(offset)
