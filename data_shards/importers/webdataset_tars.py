"""A manifest for WebDataset tars that others made: `KEY.mp4` beside `KEY.json` (with a label) or `KEY.cls`.

Each tar is read once; nothing is copied. A shard must hold one split of one class, since any class order, step
or subset is a list of shards: tars that mix classes are refused, and have to be built again.
"""

import json
import tarfile
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import numpy as np

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest, Shard, Split, check_keys
from avcil_dist.errors import ConfigError, DataError
from data_shards.verify import READ_BYTES, DigestingReader
from data_shards.workers import Begin, Progress, map_in_workers

REBUILD = "unpack it and build shards of it: avcil shards build SOURCE OUTPUT"


class _Clip(NamedTuple):
    """What a tar says of a clip: its members' offsets and sizes, its class and its split."""

    members: dict[str, tuple[int, int]]
    said: dict[str, str]


def import_tars(
    urls: Sequence[str],
    manifest_url: str,
    *,
    split: Split | None = None,
    classes: Sequence[str] = (),
    processes: int = 0,
    progress: Progress | None = None,
) -> Manifest:
    """Write the manifest of clip shards `urls`, in their order; urls below the manifest's folder become relative.

    `split` is that of tars whose records do not say. `classes` are the names of `.cls` numbers, and the order of
    the manifest's classes; without them it is that of appearance. Raises DataError for a tar that is damaged,
    compressed, or no such shard; ConfigError where a manifest is there already.
    """
    if storage.exists(manifest_url):
        raise ConfigError(f"{manifest_url}: there is a manifest; give another name, or remove it")
    root = storage.parent(manifest_url)
    total = len(urls)

    def begun(count: int) -> None:
        if progress:
            progress(min(count, total), total)

    work = partial(_index_tar, root, split, tuple(classes))
    shards = map_in_workers(work, urls, processes=processes, begun=begun)
    _check_unique(shards)
    names = dict.fromkeys([*classes, *(shard.class_name for shard in shards)])
    present = {shard.class_name for shard in shards}
    kept = tuple(name for name in names if name in present)
    manifest = Manifest(kind="clip", classes=kept, shards=tuple(shards), shape={}, root=root)
    manifest.save(manifest_url)
    return manifest


def _check_unique(shards: Sequence[Shard]) -> None:
    seen: dict[tuple[str, str, str], str] = {}
    for shard in shards:
        for key in shard.keys:
            other = seen.setdefault((shard.class_name, shard.split, key), shard.url)
            if other != shard.url:
                raise DataError(f"{shard.url}: clip {key!r} is in {other} too; a class has a key once; {REBUILD}")


def _index_tar(
    root: str, split: Split | None, classes: tuple[str, ...], url: str, lethal: frozenset[int], begin: Begin
) -> Shard:
    filesystem, path = storage.open_filesystem(url)
    try:
        with filesystem.open(path, "rb", block_size=READ_BYTES * 8) as file:
            reader = DigestingReader(file)
            clips = _read_clips(url, reader, split, classes)
            reader.drain()
    except FileNotFoundError:
        raise DataError(f"{url}: missing") from None
    except tarfile.TarError as error:
        raise DataError(f"{url}: not a tar, or cut or compressed ({error})") from None
    begin(0)
    check_keys(f"{url}: {REBUILD}", clips)
    said = {name: sorted({clip.said[name] for clip in clips.values()}) for name in ("label", "split")}
    for name, values in said.items():
        if len(values) != 1:
            raise DataError(
                f"{url}: holds more than one {name} ({', '.join(values[:3])}); a shard holds one; {REBUILD}"
            )
    members = list(next(iter(clips.values())).members)
    return Shard(
        url=url.removeprefix(root.rstrip("/") + "/"),
        class_name=said["label"][0],
        split=_split(said["split"][0], url),
        bytes=reader.size,
        sha256=reader.digest.hexdigest(),
        keys=tuple(clips),
        offsets={name: np.array([clip.members[name][0] for clip in clips.values()], np.int64) for name in members},
        sizes={name: np.array([clip.members[name][1] for clip in clips.values()], np.int64) for name in members},
    )


def _read_clips(url: str, reader: DigestingReader, split: Split | None, classes: tuple[str, ...]) -> dict[str, _Clip]:
    clips: dict[str, _Clip] = {}
    with tarfile.open(fileobj=reader, mode="r|", bufsize=READ_BYTES) as tar:  # type: ignore[call-overload]
        for info in tar:
            if not info.isreg():
                continue
            folder, _, name = info.name.rpartition("/")
            stem, _, ending = name.partition(".")  # as WebDataset splits it: at the first dot
            key = f"{folder}/{stem}" if folder else stem
            clip = clips.setdefault(key, _Clip({}, {}))
            if ending in clip.members:
                raise DataError(f"{url}: {info.name} comes twice; {REBUILD}")
            clip.members[ending] = info.offset_data, info.size
            if ending in ("json", "cls"):
                member = tar.extractfile(info)
                content = member.read() if member else b""
                clip.said.update(_said(f"{url}: {info.name}", ending, content, classes))
    if not clips:
        raise DataError(f"{url}: no clip in it")
    first = next(iter(clips.values())).members.keys()
    for key, clip in clips.items():
        if "mp4" not in clip.members or "label" not in clip.said:
            raise DataError(f"{url}: clip {key!r} has no mp4, or no json or cls with its class; {REBUILD}")
        if clip.members.keys() != first:
            raise DataError(f"{url}: clip {key!r} has other members than the first; {REBUILD}")
        clip.said.setdefault("split", split or "")
    return clips


def _said(where: str, ending: str, content: bytes, classes: tuple[str, ...]) -> dict[str, str]:
    """Class and split, as far as a member says them. A class number alone becomes a name by `classes`."""
    try:
        if ending == "json":
            record: Any = json.loads(content)
            return {name: str(record[name]) for name in ("label", "split") if name in record}
        label = content.decode().strip()
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: cannot be read ({error})") from None
    if not label.isdigit():
        return {"label": label}
    if classes and int(label) >= len(classes):
        raise DataError(f"{where}: class {label}, but {len(classes)} names were given")
    return {"label": classes[int(label)] if classes else f"class_{int(label):03d}"}


def _split(name: str, url: str) -> Split:
    for split in get_args(Split):
        if name == split:
            return split
    raise DataError(f"{url}: its records say the split {name!r}; give --split train, val or test")
