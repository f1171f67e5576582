"""Holds shards against their manifest: what is missing, what was changed, and what there is."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from avcil_dist import storage
from avcil_dist.data.manifest import SPLITS, Manifest, Shard, load_manifest
from avcil_dist.errors import DataError


@dataclass(frozen=True)
class TableRow:
    """One split of one class, counted."""

    class_name: str
    split: str
    shards: int
    clips: int
    bytes: int


def table(manifest: Manifest) -> list[TableRow]:
    """Shards, clips and bytes per class and split, in the manifest's class order; empty ones are left out."""
    rows = []
    for class_name in manifest.classes:
        for split in SPLITS:
            shards = [manifest.shards[number] for number in manifest.shard_numbers([class_name], split)]
            if shards:
                clips, size = sum(shard.count for shard in shards), sum(shard.bytes for shard in shards)
                rows.append(TableRow(class_name, split, len(shards), clips, size))
    return rows


def verify_shards(manifest_url: str, *, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read every shard and hold it against the manifest; one line per fault, none when all is well.

    `progress` is called with the shards done and the shards in all. Raises DataError for a manifest that
    cannot be read.
    """
    manifest = load_manifest(manifest_url)
    faults: list[str] = []
    for number, shard in enumerate(manifest.shards):
        faults += _shard_faults(manifest.url(number), shard)
        if progress:
            progress(number + 1, len(manifest.shards))
    return faults


def _shard_faults(url: str, shard: Shard) -> list[str]:
    try:
        content = storage.read_bytes(url)
    except DataError as error:
        return [str(error)]
    if len(content) != shard.bytes:
        return [f"{url}: {len(content)} bytes, the manifest says {shard.bytes}"]
    if storage.sha256(content) != shard.sha256:
        return [f"{url}: its sha256 is not the manifest's; its bytes were changed"]
    return _tar_faults(url, shard, content) + _label_faults(url, shard, content)


def _tar_faults(url: str, shard: Shard, content: bytes) -> list[str]:
    expected = {
        f"{key}.{member}": (int(shard.offsets[member][row]), int(shard.sizes[member][row]))
        for member in shard.offsets
        for row, key in enumerate(shard.keys)
    }
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            found = {info.name: (info.offset_data, info.size) for info in tar}
    except tarfile.TarError as error:
        return [f"{url}: not a tar ({error})"]
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return [
        f"{url}: {name}: (offset, size) {found.get(name, 'missing')}, the manifest says {expected.get(name, 'nothing')}"
        for name in sorted(wrong)
    ]


def _label_faults(url: str, shard: Shard, content: bytes) -> list[str]:
    faults = []
    for key, offset, size in zip(shard.keys, shard.offsets["json"], shard.sizes["json"], strict=True):
        try:
            record = json.loads(content[offset : offset + size])
            said = (record["label"], record["split"])
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f"{url}: {key}.json: no label and split in it ({error!r})")
            continue
        if said != (shard.class_name, shard.split):
            faults.append(f"{url}: {key}.json says {said}, the manifest {(shard.class_name, shard.split)}")
    return faults
