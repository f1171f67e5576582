"""Holds shards against their manifest: what is missing, what was changed, and what there is."""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from avcil_dist import storage
from avcil_dist.data.manifest import SPLITS, Manifest, Shard, load_manifest
from avcil_dist.errors import DataError
from data_shards.workers import Begin, Progress, map_in_workers

READ_BYTES = 1 << 20


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
    grouped: dict[tuple[str, str], list[Shard]] = {(name, split): [] for name in manifest.classes for split in SPLITS}
    for shard in manifest.shards:
        grouped[shard.class_name, shard.split].append(shard)
    return [
        TableRow(name, split, len(shards), sum(shard.count for shard in shards), sum(shard.bytes for shard in shards))
        for (name, split), shards in grouped.items()
        if shards
    ]


def verify_shards(manifest_url: str, *, processes: int = 0, progress: Progress | None = None) -> list[str]:
    """Read every shard and hold it against the manifest; one line per fault, none when all is well.

    A shard is read once, a small part at a time, by one of `processes` (0: this one). `progress` is called with
    the shards done and the shards in all. Raises DataError for a manifest that cannot be read.
    """
    return [fault for faults in _faults(load_manifest(manifest_url), processes, progress) for fault in faults]


def repair_manifest(
    manifest_url: str, *, processes: int = 0, progress: Progress | None = None
) -> tuple[Manifest, list[str]]:
    """Rewrite a manifest so that it lists the shards that are intact; the new manifest, and the faults found.

    The manifest as it was is kept beside it, as `manifest.before-repair.json`. Nothing is changed where all is
    well. Raises DataError when no shard is intact.
    """
    manifest = load_manifest(manifest_url)
    faults = _faults(manifest, processes, progress)
    intact = tuple(shard for shard, found in zip(manifest.shards, faults, strict=True) if not found)
    if not intact:
        raise DataError(f"{manifest_url}: not one shard is intact; nothing was changed; build them again")
    said = [fault for found in faults for fault in found]
    if not said:
        return manifest, []
    present = {shard.class_name for shard in intact}
    classes = tuple(name for name in manifest.classes if name in present)
    repaired = replace(manifest, classes=classes, shards=intact)
    storage.write_bytes(f"{manifest_url.removesuffix('.json')}.before-repair.json", storage.read_bytes(manifest_url))
    repaired.save(manifest_url)
    return repaired, said


def _faults(manifest: Manifest, processes: int, progress: Progress | None) -> list[list[str]]:
    """The faults of each shard."""
    total = len(manifest.shards)

    def begun(count: int) -> None:
        if progress:
            progress(min(count, total), total)

    return map_in_workers(partial(_check_shard, manifest), range(total), processes=processes, begun=begun)


def _check_shard(manifest: Manifest, number: int, lethal: frozenset[int], begin: Begin) -> list[str]:
    faults = _shard_faults(manifest.url(number), manifest.shards[number])
    begin(0)
    return faults


def _shard_faults(url: str, shard: Shard) -> list[str]:
    try:
        found = storage.size(url)
        if found != shard.bytes:
            return [f"{url}: {found} bytes, the manifest says {shard.bytes}"]
        filesystem, path = storage.open_filesystem(url)
        with filesystem.open(path, "rb", block_size=READ_BYTES * 8) as file:
            reader = DigestingReader(file)
            faults = _tar_faults(url, shard, reader)
            reader.drain()
    except (DataError, OSError) as error:
        return [str(error) if url in str(error) else f"{url}: {error}"]
    if reader.digest.hexdigest() != shard.sha256:
        return [f"{url}: its sha256 is not the manifest's; its bytes were changed"]
    return faults


class DigestingReader:
    """A file read once, from beginning to end, whose digest is made on the way."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = bytes(self._file.read(size))
        self.digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        """Read what is left."""
        while self.read(READ_BYTES):
            continue


def _tar_faults(url: str, shard: Shard, reader: DigestingReader) -> list[str]:
    """What is not at its place, and which records say another class or split."""
    expected = {
        f"{key}.{member}": (int(shard.offsets[member][row]), int(shard.sizes[member][row]))
        for member in shard.offsets
        for row, key in enumerate(shard.keys)
    }
    found: dict[str, tuple[int, int]] = {}
    faults: list[str] = []
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=READ_BYTES) as tar:  # type: ignore[call-overload]
            for info in tar:
                if not info.isreg():
                    continue
                found[info.name] = info.offset_data, info.size
                if info.name.endswith(".json"):
                    member = tar.extractfile(info)
                    faults += _label_faults(url, shard, info.name, member.read() if member else b"")
    except tarfile.TarError as error:
        return [f"{url}: not a tar ({error})"]
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [
        f"{url}: {name}: (offset, size) {found.get(name, 'missing')}, the manifest says {expected.get(name, 'nothing')}"
        for name in wrong
    ] + faults


def _label_faults(url: str, shard: Shard, name: str, content: bytes) -> Sequence[str]:
    """Where a record contradicts the manifest; in shards that others made, it need not say anything."""
    try:
        record: dict[str, Any] = dict(json.loads(content))
    except (ValueError, TypeError) as error:
        return [f"{url}: {name}: no record ({error!r})"]
    manifests = shard.class_name, shard.split
    said = str(record.get("label", manifests[0])), str(record.get("split", manifests[1]))
    return [] if said == manifests else [f"{url}: {name} says {said}, the manifest {manifests}"]
