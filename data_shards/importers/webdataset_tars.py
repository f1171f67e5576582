"""Importer of WebDataset tars: writes a manifest for `KEY.mp4` beside `KEY.json` (with a label) or `KEY.cls`.

Each tar is read once; nothing is copied. A shard must hold one split of one class, since any class order, step
or subset is a list of shards. Tars that mix classes are refused; `repack.py` sorts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from avcil_dist import storage
from avcil_dist.data.clip_table import Region
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import Shard, Split, check_keys
from avcil_dist.errors import ConfigError, DataError
from data_shards.listings.tar_labels import SPLIT_WORDS, label_of_text, label_of_value, read_json, split_of_value
from data_shards.shard_writer import region_of
from data_shards.tar_stream import READ_BYTES, DigestingReader, tar_members
from data_shards.workers import MarkStart, Progress, map_in_workers

REBUILD = "sort its clips into shards like those of avcil shards build: avcil shards repack URL OUTPUT"


@dataclass
class _Clip:
    """A clip of a tar: offset and size of each member, and its metadata (label, split) as far as the tar has it."""

    members: dict[str, tuple[int, int]]
    metadata: dict[str, str]
    region: Region | None = None


def import_tars(
    urls: Sequence[str],
    manifest_url: str,
    *,
    split: Split | None = None,
    classes: Sequence[str] = (),
    processes: int = 0,
    progress: Progress | None = None,
) -> Manifest:
    """Write the manifest of clip shards `urls`, in their order; all are below the manifest's folder.

    `split` is the split of tars whose metadata has none. `classes` are the names of `.cls` numbers, and the order
    of the manifest's classes; by default it is that of appearance. Raises DataError for a tar that is damaged,
    compressed, or no such shard; ConfigError for one elsewhere, and where a manifest exists already.
    """
    if storage.exists(manifest_url):
        raise ConfigError(f"{manifest_url}: the manifest exists already; give another name, or remove it")
    root = storage.parent(manifest_url)
    for url in urls:
        _url_in_manifest(url, root)
    total = len(urls)

    def on_start(count: int) -> None:
        if progress:
            progress(min(count, total), total)

    work = partial(_import_tar, root, split, tuple(classes))
    shards = map_in_workers(work, urls, processes=processes, on_start=on_start)
    _check_unique(shards)
    names = dict.fromkeys([*classes, *(shard.class_name for shard in shards)])
    present = {shard.class_name for shard in shards}
    ordered = tuple(name for name in names if name in present)
    manifest = Manifest(kind="clip", classes=ordered, shards=tuple(shards), shape={}, root=root)
    manifest.save(manifest_url)
    return manifest


def _url_in_manifest(url: str, root: str) -> str:
    inner = storage.path_below(url, root)
    if inner is None:
        raise ConfigError(
            f"{url}: not below {root}, the folder of the manifest, where its shards must be; "
            "give --output a folder that holds all of them"
        )
    return storage.inner_path(inner)


def _check_unique(shards: Sequence[Shard]) -> None:
    groups: dict[tuple[str, str], list[Shard]] = {}
    for shard in shards:
        groups.setdefault((shard.class_name, shard.split), []).append(shard)
    for group in groups.values():  # the keys of one group are in memory at a time
        seen: dict[str, str] = {}
        for shard in group:
            for key in shard.keys:
                other = seen.setdefault(key, shard.url)
                if other != shard.url:
                    raise DataError(
                        f"{shard.url}: clip {key!r} is in {other} too; keys are unique in a split of a class; {REBUILD}"
                    )


def _import_tar(
    root: str, split: Split | None, classes: tuple[str, ...], url: str, crashed: frozenset[int], mark_start: MarkStart
) -> Shard:
    with storage.open_file(url, READ_BYTES * 8) as file:
        reader = DigestingReader(file, storage.size(url))
        clips = _read_clips(url, reader, split, classes)
        reader.drain()
    mark_start(0)
    try:
        check_keys(url, list(clips))
    except DataError as error:
        raise DataError(f"{error}; {REBUILD}") from None
    metadata = {name: sorted({clip.metadata[name] for clip in clips.values()}) for name in ("label", "split")}
    for name, values in metadata.items():
        if len(values) != 1:
            raise DataError(
                f"{url}: holds more than one {name} ({', '.join(values[:3])}); a shard holds one; {REBUILD}"
            )
    members = list(next(iter(clips.values())).members)
    regions = tuple(clip.region for clip in clips.values())
    return Shard.of(
        url=_url_in_manifest(url, root),
        class_name=metadata["label"][0],
        split=_split(metadata["split"][0], url),
        bytes=reader.size,
        sha256=reader.digest.hexdigest(),
        keys=tuple(clips),
        regions=regions if any(regions) else None,
        offsets={name: np.array([clip.members[name][0] for clip in clips.values()], np.int64) for name in members},
        sizes={name: np.array([clip.members[name][1] for clip in clips.values()], np.int64) for name in members},
    )


def _read_clips(url: str, reader: DigestingReader, split: Split | None, classes: tuple[str, ...]) -> dict[str, _Clip]:
    clips: dict[str, _Clip] = {}
    for path, offset, size, content in tar_members(reader, url, (".json", ".cls")):
        folder, _, name = path.rpartition("/")
        stem, _, ending = name.partition(".")  # as WebDataset splits it: at the first dot
        key = f"{folder}/{stem}" if folder else stem
        clip = clips.setdefault(key, _Clip({}, {}))
        if ending in clip.members:
            raise DataError(f"{url}: {path} is a duplicate; {REBUILD}")
        clip.members[ending] = offset, size
        if content is not None and ending in ("json", "cls"):
            clip.metadata.update(_metadata(f"{url}: {path}", ending, content, classes))
            clip.region = clip.region or (region_of(content) if ending == "json" else None)
    if not clips:
        raise DataError(f"{url}: no clip in it")
    first = next(iter(clips.values())).members.keys()
    for key, clip in clips.items():
        if "mp4" not in clip.members or "label" not in clip.metadata:
            raise DataError(f"{url}: clip {key!r} has no mp4, or no json or cls with its class; {REBUILD}")
        if clip.members.keys() != first:
            raise DataError(f"{url}: clip {key!r} has other members than the first; {REBUILD}")
        clip.metadata.setdefault("split", split or "")
    return clips


def _metadata(where: str, ending: str, content: bytes, classes: tuple[str, ...]) -> dict[str, str]:
    """Label and split of a json or cls member, as far as it has them. `classes` are the names of class numbers."""
    if ending != "json":
        return {"label": label_of_text(content, classes, where)}
    values = read_json(content, where)
    label = {"label": label_of_value(values["label"], classes, where)} if "label" in values else {}
    if "split" not in values:
        return label
    try:
        return label | {"split": split_of_value(values["split"], where)}
    except DataError as error:
        raise DataError(f"{error}; {REBUILD} --split 0.8,0.1,0.1") from None


def _split(name: str, url: str) -> Split:
    if name not in SPLIT_WORDS:
        raise DataError(f"{url}: its metadata has no split; give --split train, val or test")
    return SPLIT_WORDS[name]
