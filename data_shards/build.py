"""From raw clips to clip shards and their manifest.

The source is a csv or a folder; every clip is decoded once before it is taken. The manifest is written last:
without it there is no data set. What a broken run had finished stays in `parts/` and is not done again.
Nothing is transcoded.
"""

import csv
import io
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch

from avcil_dist import storage
from avcil_dist.data.decode import decode_clip, probe_clip
from avcil_dist.data.manifest import SPLITS, Manifest, Shard, Split, load_manifest
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.seeds import derive_seed
from data_shards.synthetic import end_with_starter
from data_shards.writer import shard_url, write_shard

FORMAT = 1
PARTS, MANIFEST, REJECTED, RECORD = "parts", "manifest.json", "rejected.csv", "build.json"
COLUMNS = {"path", "label", "split"}
KEY_LENGTH = 90  # the tar format wants names below 100 characters
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SourceClip:
    """One file; `source` names the video that it was cut from."""

    path: str
    key: str
    source: str


@dataclass(frozen=True)
class Unit:
    """The clips of one split of one class, in source order: what one process builds."""

    class_number: int
    class_name: str
    split: Split
    clips: tuple[SourceClip, ...]

    def fingerprint(self) -> list[object]:
        """What the unit's shards depend on; a file is known by its size and time."""
        return [
            self.class_number,
            self.class_name,
            self.split,
            [[clip.key, clip.source, *_stamp(Path(clip.path))] for clip in self.clips],
        ]


@dataclass(frozen=True)
class Rejection:
    """A clip that is in no shard, and why."""

    path: str
    label: str
    split: str
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """What a build made. `unchanged` when the output was there already, of the same inputs and settings."""

    manifest_url: str
    manifest: Manifest
    rejected: tuple[Rejection, ...]
    unchanged: bool

    @property
    def rejected_per_class(self) -> dict[str, int]:
        """Rejected clips of each class that has some."""
        return dict(Counter(rejection.label for rejection in self.rejected))


@dataclass(frozen=True)
class _Settings:
    output: str
    clips_per_shard: int
    min_seconds: float

    def digest(self, content: Any) -> str:
        """Equal for equal inputs and settings; the place of the output is no part of it."""
        text = json.dumps([FORMAT, self.clips_per_shard, self.min_seconds, content], sort_keys=True)
        return storage.sha256(text.encode())


def build_shards(
    source: Path,
    output: str,
    *,
    clips_per_shard: int,
    min_seconds: float,
    processes: int = 1,
    strict: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the shards of `source` (see `read_source`) into the folder or url `output`.

    Clips that are unreadable, silent, shorter than `min_seconds`, no mp4 or come twice are left out and listed
    in `rejected.csv`; with `strict` any such clip is an error and no manifest is written. `progress` is called
    with the clips done and the clips in all. An output that these inputs and settings made is left as it is.
    Raises ConfigError for an output that others made, DataError for a source that cannot be read or has no good clip.
    """
    if clips_per_shard < 1:
        raise ConfigError(f"clips_per_shard: {clips_per_shard}; a shard needs at least one clip")
    settings = _Settings(output, clips_per_shard, min_seconds)
    classes, units = read_source(source)
    digests = [settings.digest(unit.fingerprint()) for unit in units]
    digest = settings.digest([classes, digests])
    manifest_url = storage.join(output, MANIFEST)
    if storage.exists(manifest_url):
        return _existing(manifest_url, output, digest)
    made_here = not storage.exists(output)

    parts = _build_units(units, digests, settings, processes, progress)
    shards = [Shard.from_record(record) for part in parts for record in part["shards"]]
    rejected = tuple(Rejection(**record) for part in parts for record in part["rejected"])
    if not shards:
        storage.remove_tree(output if made_here else storage.join(output, PARTS))
        raise DataError(f"{source}: no clip could be taken; {_first(rejected)}")
    if strict and rejected:
        raise DataError(
            f"{source}: {len(rejected)} clips rejected; {_first(rejected)}; mend them, or leave out --strict"
        )
    present = {shard.class_name for shard in shards}
    manifest = Manifest(
        kind="clip",
        classes=tuple(name for name in classes if name in present),
        shards=tuple(shards),
        shape={},
        root=output.rstrip("/"),
    )
    _write_rejected(storage.join(output, REJECTED), rejected)
    storage.write_json(storage.join(output, RECORD), {"digest": digest, "content_hash": manifest.content_hash})
    manifest.save(manifest_url)
    storage.remove_tree(storage.join(output, PARTS))
    return BuildReport(manifest_url, manifest, rejected, unchanged=False)


def _existing(manifest_url: str, output: str, digest: str) -> BuildReport:
    manifest = load_manifest(manifest_url)
    record_url = storage.join(output, RECORD)
    record = storage.read_json(record_url) if storage.exists(record_url) else {}
    if record != {"digest": digest, "content_hash": manifest.content_hash}:
        raise ConfigError(
            f"{manifest_url}: made from other clips or with other settings; give another output, or remove this one"
        )
    storage.remove_tree(storage.join(output, PARTS))  # a run may have been killed just before it did
    text = storage.read_bytes(storage.join(output, REJECTED)).decode()
    rejected = tuple(Rejection(**row) for row in csv.DictReader(io.StringIO(text)))
    return BuildReport(manifest_url, manifest, rejected, unchanged=True)


def _build_units(
    units: list[Unit], digests: list[str], settings: _Settings, processes: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """The part of each unit, in order; a unit is built by one process."""
    total, parts = sum(len(unit.clips) for unit in units), []
    done = 0
    with _Mapper(processes) as run:
        for unit, part in zip(units, run(partial(_build_unit, settings), units, digests), strict=True):
            parts.append(part)
            done += len(unit.clips)
            if progress:
                progress(done, total)
    return parts


class _Mapper:
    """`map` in this process or in a pool of processes, which a fault does not leave working on."""

    def __init__(self, processes: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])  # torch is imported once, not by every process
            self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> Callable[..., Iterator[Any]]:
        return self._pool.map if self._pool else map

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if kind is BrokenProcessPool:
            raise DataError("a building process died; start again to continue, with --processes 1 to see at which clip")


def _start_worker() -> None:
    torch.set_num_threads(1)
    end_with_starter()


def _build_unit(settings: _Settings, unit: Unit, digest: str) -> dict[str, Any]:
    """Build the shards of one split of one class, or read what an earlier run left of it."""
    part_url = storage.join(settings.output, PARTS, f"{unit.split}-{unit.class_number:03d}.json")
    if storage.exists(part_url):
        part = storage.read_json(part_url)
        if part["digest"] == digest and _shards_lie(settings.output, part["shards"]):
            return dict(part)
    _clear(storage.join(settings.output, unit.split), f"c{unit.class_number:03d}-")
    rejected: list[Rejection] = []
    good = _good_clips(unit, settings.min_seconds, rejected)
    shards: list[Shard] = []
    while clips := list(islice(good, settings.clips_per_shard)):
        url = shard_url(unit.split, unit.class_number, unit.class_name, len(shards))
        shards.append(write_shard(url, root=settings.output, class_name=unit.class_name, split=unit.split, clips=clips))
    part = {
        "digest": digest,
        "shards": [shard.to_record() for shard in shards],
        "rejected": [asdict(rejection) for rejection in rejected],
    }
    storage.write_json(part_url, part)
    return part


def _shards_lie(output: str, records: list[dict[str, Any]]) -> bool:
    urls = [(storage.join(output, record["url"]), record["bytes"]) for record in records]
    return all(storage.exists(url) and storage.size(url) == size for url, size in urls)


def _clear(folder: str, prefix: str) -> None:
    """Remove what an earlier run with other settings left of a unit, so that no tar lies there unlisted."""
    filesystem, path = storage.open_filesystem(folder)
    filesystem.invalidate_cache()
    for entry in filesystem.ls(path, detail=False) if filesystem.exists(path) else []:
        if entry.rsplit("/", 1)[-1].startswith(prefix):
            filesystem.rm(entry)


def _good_clips(unit: Unit, min_seconds: float, rejected: list[Rejection]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each clip that can be taken; the others go to `rejected`."""
    taken: set[str] = set()
    for clip in unit.clips:
        try:
            if clip.key in taken:
                raise DataError(f"{clip.path}: duplicate key {clip.key!r} in this split of its class")
            members = _members(clip, unit.class_name, unit.split, min_seconds)
        except DataError as error:
            reason = str(error).removeprefix(f"{clip.path}: ")
            rejected.append(Rejection(clip.path, unit.class_name, unit.split, reason))
            continue
        taken.add(clip.key)
        yield clip.key, members


def _members(clip: SourceClip, label: str, split: Split, min_seconds: float) -> dict[str, bytes]:
    """The clip's bytes and its record. Raises DataError for a clip that training could not use."""
    try:
        data = Path(clip.path).read_bytes()
    except OSError as error:
        raise DataError(f"{clip.path}: missing file" if isinstance(error, FileNotFoundError) else f"{error}") from None
    info = probe_clip(data, clip.path)
    if "mp4" not in info.container.split(","):
        raise DataError(f"{clip.path}: not an mp4 ({info.container}); convert it first")
    if info.sample_rate is None:
        raise DataError(f"{clip.path}: no audio track")
    if info.duration < min_seconds:
        raise DataError(f"{clip.path}: shorter than {min_seconds:g} s ({info.duration:.2f} s)")
    decode_clip(data, num_frames=1, sample_rate=info.sample_rate, silent="error", where=clip.path)
    record = {"label": label, "split": split, "source": clip.source, "start": 0.0, "duration": round(info.duration, 6)}
    return {"mp4": data, "json": json.dumps(record, sort_keys=True).encode()}


def _first(rejected: tuple[Rejection, ...]) -> str:
    return f"the first is {rejected[0].path}: {rejected[0].reason}"


def _write_rejected(url: str, rejected: tuple[Rejection, ...]) -> None:
    text = io.StringIO()
    rows = csv.DictWriter(text, ["path", "label", "split", "reason"], lineterminator="\n")
    rows.writeheader()
    rows.writerows(asdict(rejection) for rejection in rejected)
    storage.write_bytes(url, text.getvalue().encode())


def read_source(source: Path) -> tuple[tuple[str, ...], list[Unit]]:
    """The classes and the units of a source, units ordered by class, then split.

    A csv has the header `path,label,split` (and may have `source`), paths relative to the csv; its classes are
    in order of first appearance. A folder is `source/<split>/<class>/*`, or `source/<class>/*`, whose clips are
    split 80/10/10 by a hash of class and key; its classes are sorted. Raises DataError, naming file and line.
    """
    if source.is_dir():
        rows = _folder_rows(source)
    elif source.is_file():
        rows = _csv_rows(source)
    else:
        raise DataError(f"{source}: missing; give a csv with the header path,label,split, or a folder of clips")
    if not rows:
        raise DataError(f"{source}: no clips in it")
    classes = tuple(dict.fromkeys(label for label, _, _ in rows))
    grouped: dict[tuple[str, Split], list[SourceClip]] = {(name, split): [] for name in classes for split in SPLITS}
    for label, split, clip in rows:
        grouped[label, split].append(clip)
    numbers = {name: number for number, name in enumerate(classes)}
    units = [Unit(numbers[name], name, split, tuple(clips)) for (name, split), clips in grouped.items() if clips]
    return classes, units


def safe_key(name: str) -> str:
    """A file name without its ending as a clip key: `7q1E_12.09` is `7q1E_12-09`."""
    key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    return key if len(key) <= KEY_LENGTH else f"{key[: KEY_LENGTH - 13]}-{storage.sha256(name.encode())[:12]}"


def _csv_rows(source: Path) -> list[tuple[str, Split, SourceClip]]:
    rows: list[tuple[str, Split, SourceClip]] = []
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = set(reader.fieldnames or ())
        if not COLUMNS <= header <= COLUMNS | {"source"}:
            raise DataError(f"{source}: its header is {','.join(reader.fieldnames or ())!r}; make it path,label,split")
        for row in reader:
            where = f"{source}: line {reader.line_num}"
            if None in row or not all(row[column] for column in COLUMNS):
                raise DataError(f"{where}: needs a path, a label and a split")
            path = source.parent / row["path"]
            clip = SourceClip(str(path), safe_key(path.stem), row.get("source") or path.stem)
            rows.append((row["label"], _split(row["split"], where), clip))
    return rows


def _folder_rows(source: Path) -> list[tuple[str, Split, SourceClip]]:
    top = _entries(source)
    has_splits = bool(top) and all(folder.name in SPLITS for folder in top)
    class_folders = [folder for split in top for folder in _entries(split)] if has_splits else top
    rows: list[tuple[str, Split, SourceClip]] = []
    for folder in sorted(class_folders, key=lambda folder: folder.name):
        for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
            key = safe_key(path.stem)
            split = _split(folder.parent.name, str(path)) if has_splits else _hashed_split(folder.name, key)
            rows.append((folder.name, split, SourceClip(str(path), key, path.stem)))
    return rows


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _split(name: str, where: str) -> Split:
    for split in get_args(Split):
        if name == split:
            return split
    raise DataError(f"{where}: split {name!r} is none of {', '.join(SPLITS)}")


def _hashed_split(label: str, key: str) -> Split:
    tenth = derive_seed(0, "split", label, key) % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


def _stamp(path: Path) -> tuple[int, int] | tuple[()]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns
