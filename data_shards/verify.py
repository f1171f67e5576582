"""Verification of shards against their manifest, repair of a manifest, and the table of its contents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, count

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.shard import SPLITS, Shard
from avcil_dist.errors import DataError
from data_shards.listings.listing import clean_label
from data_shards.listings.tar_labels import read_json, split_of_value
from data_shards.tar_stream import READ_BYTES, DigestingReader, tar_members
from data_shards.workers import MarkStart, Progress, map_in_workers


@dataclass(frozen=True)
class TableRow:
    """Counts of one split of one class."""

    class_name: str
    split: str
    shards: int
    clips: int
    bytes: int


def shard_table(manifest: Manifest) -> list[TableRow]:
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
    """Read every shard and compare it with the manifest. Returns one line per fault.

    A shard is read once, a small part at a time, by one of `processes` (0: this one). `progress` is called with
    the number of shards done and their total. Raises DataError for a manifest that cannot be read.
    """
    manifest = load_manifest(manifest_url)
    found = [] if replace(manifest).content_hash == manifest.content_hash else [_wrong_hash(manifest_url)]
    return found + [fault for faults in _faults(manifest_url, manifest, processes, progress) for fault in faults]


def repair_manifest(
    manifest_url: str, *, processes: int = 0, progress: Progress | None = None
) -> tuple[Manifest, list[str]]:
    """Rewrite a manifest so that it lists the intact shards only. Returns the new manifest and the faults.

    The old manifest is saved beside it as `manifest.before-repair.json`, that of a second repair as
    `manifest.before-repair-2.json`, and their clip tables stay. Without faults nothing is written.
    Raises DataError when no shard is intact.
    """
    manifest = load_manifest(manifest_url)
    faults_by_shard = _faults(manifest_url, manifest, processes, progress)
    intact = tuple(shard for shard, faults in zip(manifest.shards, faults_by_shard, strict=True) if not faults)
    if not intact:
        raise DataError(f"{manifest_url}: no shard is intact; the manifest was not changed; build the shards again")
    all_faults = [fault for faults in faults_by_shard for fault in faults]
    if not all_faults:
        return manifest, []
    present = {shard.class_name for shard in intact}
    classes = tuple(name for name in manifest.classes if name in present)
    repaired = replace(manifest, classes=classes, shards=intact)
    storage.write_bytes(_url_before_repair(manifest_url), storage.read_bytes(manifest_url))
    repaired.save(manifest_url)
    return repaired, all_faults


def _url_before_repair(manifest_url: str) -> str:
    """Return the url that the manifest is saved at: the first one that is free."""
    ends = chain([""], (f"-{number}" for number in count(2)))
    urls = (f"{manifest_url.removesuffix('.json')}.before-repair{end}.json" for end in ends)
    return next(url for url in urls if not storage.exists(url))


def _wrong_hash(manifest_url: str) -> str:
    return f"{manifest_url}: its content hash is not that of its shards and clips; build it again"


def _faults(manifest_url: str, manifest: Manifest, processes: int, progress: Progress | None) -> list[list[str]]:
    """The faults of each shard."""
    total = len(manifest.shards)

    def on_start(count: int) -> None:
        if progress:
            progress(min(count, total), total)

    work = partial(_check_shard, manifest_url, manifest.content_hash)
    return map_in_workers(work, range(total), processes=processes, on_start=on_start)


@lru_cache(maxsize=1)
def _opened(manifest_url: str, content_hash: str) -> Manifest:
    """Return the manifest, once per process: a worker maps its clips, they are not sent to it."""
    return load_manifest(manifest_url)


def _check_shard(
    manifest_url: str, content_hash: str, number: int, crashed: frozenset[int], mark_start: MarkStart
) -> list[str]:
    manifest = _opened(manifest_url, content_hash)
    faults = _shard_faults(manifest.url(number), manifest.shards[number])
    mark_start(0)
    return faults


def _shard_faults(url: str, shard: Shard) -> list[str]:
    try:
        size = storage.size(url)
        if size != shard.bytes:
            return [f"{url}: {size} bytes, in the manifest {shard.bytes}"]
        with storage.open_file(url, READ_BYTES * 8) as file:
            reader = DigestingReader(file, size)
            faults = _tar_faults(url, shard, reader)
            reader.drain()
    except (DataError, OSError) as error:
        return [str(error) if url in str(error) else f"{url}: {error}"]
    if reader.digest.hexdigest() != shard.sha256:
        return [f"{url}: its sha256 is not that of the manifest; its bytes were changed"]
    return faults


def _tar_faults(url: str, shard: Shard, reader: DigestingReader) -> list[str]:
    """Members that are not at their offset, and metadata with another class or split."""
    keys, offsets, sizes = shard.keys, shard.offsets, shard.sizes
    expected = {
        f"{key}.{member}": (int(offsets[member][row]), int(sizes[member][row]))
        for member in offsets
        for row, key in enumerate(keys)
    }
    actual: dict[str, tuple[int, int]] = {}
    faults: list[str] = []
    for name, offset, size, content in tar_members(reader, url, (".json",)):
        actual[name] = offset, size
        if content is not None:
            faults += _label_faults(url, shard, name, content)
    wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    return [
        f"{url}: {name}: (offset, size) {actual.get(name, 'missing')}, in the manifest {expected.get(name, 'missing')}"
        for name in wrong
    ] + faults


def _label_faults(url: str, shard: Shard, name: str, content: bytes) -> Sequence[str]:
    """Contradictions between metadata and manifest. Metadata of imported shards may lack class and split."""
    try:
        metadata = read_json(content, f"{url}: {name}")
        label = clean_label(str(metadata.get("label", shard.class_name)), f"{url}: {name}")
        split = split_of_value(metadata.get("split", shard.split), f"{url}: {name}")
    except DataError as error:
        return [str(error)]
    expected = shard.class_name, shard.split
    actual = label, split
    return [] if actual == expected else [f"{url}: {name}: class and split {actual}, in the manifest {expected}"]
