"""Download of a published data set, and its import as shards: files, digests, unpacking, shards.

`FOLDER/downloads` holds the files under their published paths and so is itself a mirror, `FOLDER/unpacked` the features
until they are imported, `FOLDER/shards` the shards. Each part continues where an earlier run stopped.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError, StorageError
from avcil_dist.storage.hub import HubRevision, hub_revision
from data_shards.build_plan import BuildReport
from data_shards.downloads.archives import remove_unpacked, unpack_features
from data_shards.downloads.disk import check_room, free_bytes, in_words
from data_shards.downloads.http import HttpSource, is_http
from data_shards.downloads.lock import Lock, LockedFile, check_digest, read_lock, write_lock
from data_shards.downloads.sources import FRAMES, DataSet, SourceFile
from data_shards.downloads.transfer import Source, StorageSource, bytes_here, transfer
from data_shards.importers.input_digests import input_digests
from data_shards.importers.released_features import import_features
from data_shards.output_lock import sole_build
from data_shards.workers import Progress

DOWNLOADS, UNPACKED, SHARDS = "downloads", "unpacked", "shards"
UNPACKED_SHARE, SHARDS_SHARE = 1.15, 0.6  # of the archive's bytes: floats compress little, shards have float16
Keep = Literal["archives", "all", "nothing"]


@dataclass(frozen=True)
class Listed:
    """A file of a data set before the download: its source (None where it is here), place, size and revision."""

    file: SourceFile
    path: Path
    source: Source | None
    size: int | None
    revision: str
    hub_sha256: str | None = None

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to come."""
        return 0 if self.source is None or self.size is None else max(0, self.size - bytes_here(self.path))


@dataclass(frozen=True)
class Meters:
    """Progress of the parts, each called with done and total: MiB downloaded, read, unpacked; clips imported."""

    download: Progress
    digest: Progress
    unpack: Progress
    clips: Progress


@dataclass(frozen=True)
class Fetched:
    """Result of `get_data_set`: the files, and the report of the import.

    `report` is None for a data set of lists, and for shards that another process has made meanwhile.
    """

    paths: dict[str, Path]
    report: BuildReport | None


def list_files(data_set: DataSet, folder: Path, mirror: str | None) -> list[Listed]:
    """Return the files of a data set, with the sources of those that are not here.

    `mirror` is a folder or url with the files under their published paths; None for the published places. The hub's
    files that it lacks come from the hub. Raises StorageError where a source does not answer, DataError where it lacks
    a file.
    """
    lock = read_lock(folder / DOWNLOADS)
    listed, hub = [], None
    for file in data_set.files:
        path = folder / DOWNLOADS / file.path
        fault = None
        if mirror is not None:
            try:
                listed.append(_of_mirror(file, path, mirror, lock))
                continue
            except DataError as error:
                if file.repository is None:
                    raise
                fault = error
        if path.is_file():
            listed.append(_here(file, path, lock))
        elif file.url is not None:
            source = HttpSource(file.url)
            listed.append(Listed(file, path, source, source.size(), ""))
        else:
            try:
                hub = hub or _hub_revision(str(file.repository), lock, data_set)
                listed.append(_of_hub(file, path, hub))
            except (DataError, StorageError) as error:
                if fault is None:
                    raise
                raise DataError(f"{fault}; nor does the hub give it: {error}") from None
    return listed


def _here(file: SourceFile, path: Path, lock: Lock) -> Listed:
    locked = lock.files.get(file.path)
    return Listed(file, path, None, path.stat().st_size, locked.revision if locked else "")


def _of_mirror(file: SourceFile, path: Path, mirror: str, lock: Lock) -> Listed:
    """Return a file that is here, or in a mirror. Raises DataError where the mirror lacks it."""
    if path.is_file():
        return _here(file, path, lock)
    if not is_http(mirror) and storage.local_path(mirror) is not None:
        path = Path(str(storage.local_path(storage.join(mirror, file.path))))
        return Listed(file, path, None, storage.size(str(path)), "")
    url = f"{mirror.rstrip('/')}/{file.path}"
    source: Source = HttpSource(url) if is_http(mirror) else StorageSource(url)
    return Listed(file, path, source, source.size(), "")


def _of_hub(file: SourceFile, path: Path, hub: HubRevision) -> Listed:
    known = hub.files.get(file.path)
    if known is None:
        raise DataError(f"{hub.repository} ({hub.commit[:12]}): has no {file.path}; give a mirror with --from")
    return Listed(file, path, HttpSource(hub.url(file.path)), known.size, hub.commit, known.sha256)


def describe_files(data_set: DataSet, listed: Sequence[Listed], folder: Path) -> list[str]:
    """Return lines for people: each file, and the bytes that are needed in all."""
    lines = [data_set.title]
    for entry in listed:
        size = "size unknown" if entry.size is None else in_words(entry.size)
        state = "here" if entry.source is None else "to download"
        lines.append(f"  {entry.file.path}  {size}  {state}")
    missing = sum(entry.missing_bytes for entry in listed)
    needed = _needed(data_set, listed)
    lines.append(
        f"{in_words(missing)} to download, {in_words(needed)} of disk in all, {in_words(free_bytes(folder))} free"
    )
    return lines


def get_data_set(
    data_set: DataSet, listed: Sequence[Listed], folder: Path, output: str, *, keep: Keep, meters: Meters
) -> Fetched:
    """Download what is missing, verify and record all digests, and import the features as shards at `output`.

    Raises ConfigError for a missing library, StorageError for a disk without room or a source that does not answer,
    DataError for a file that is not the published or the recorded one.
    """
    if data_set.needs_hdf5 and importlib.util.find_spec("h5py") is None:
        raise ConfigError(
            f"{data_set.name}: its features are HDF5 files, which need h5py; pip install 'avcil-dist[hdf5]'"
        )
    downloads = folder / DOWNLOADS
    with sole_build(str(downloads)):
        listed = _listed_now(listed, downloads)
        paths = {entry.file.path: entry.path for entry in listed}
        if is_imported(data_set, folder, output):
            return Fetched(paths, None)
        check_room(folder, _needed(data_set, listed), "in all (download, unpacked features, shards)")
        _download(listed, meters.download)
        lock = _verify(listed, downloads, meters.digest)
        if not data_set.archive:
            return Fetched(paths, None)
        parts = [paths[file.path] for file in data_set.archive]
        features = unpack_features(parts, folder / UNPACKED, meters.unpack)
        report = import_features(
            features.visual,
            features.audio,
            paths[data_set.lists[0].path].parent,
            output,
            frames=FRAMES,
            clips_per_shard=128,
            digest_progress=meters.digest,
            progress=meters.clips,
        )
        write_lock(downloads, lock.model_copy(update={"imported": _inputs(data_set, lock, output)}))
        if keep != "all":
            remove_unpacked(folder / UNPACKED)
        if keep == "nothing":
            for part in parts:
                if part.is_relative_to(downloads):
                    part.unlink(missing_ok=True)
        return Fetched(paths, report)


def _listed_now(listed: Sequence[Listed], downloads: Path) -> list[Listed]:
    """Return the files as they are listed now: another process may have downloaded some since."""
    lock = read_lock(downloads)
    return [_here(entry.file, entry.path, lock) if entry.path.is_file() else entry for entry in listed]


def is_imported(data_set: DataSet, folder: Path, output: str) -> bool:
    """Whether shards of the recorded files are at `output`: nothing is to be done, even without the archives."""
    lock = read_lock(folder / DOWNLOADS)
    if not data_set.archive or any(file.path not in lock.files for file in data_set.files):
        return False
    return lock.imported == _inputs(data_set, lock, output) and storage.exists(storage.join(output, "manifest.json"))


def _inputs(data_set: DataSet, lock: Lock, output: str) -> str:
    """Return the digest of the recorded files of a data set and of the place of its shards."""
    digests = [lock.files[path].sha256 for path in sorted(file.path for file in data_set.files)]
    return storage.sha256("\n".join([output, *digests]).encode())


def _needed(data_set: DataSet, listed: Sequence[Listed]) -> int:
    archive = sum(entry.size or 0 for entry in listed if entry.file in data_set.archive)
    return sum(entry.missing_bytes for entry in listed) + int(archive * (UNPACKED_SHARE + SHARDS_SHARE))


def _hub_revision(repository: str, lock: Lock, data_set: DataSet) -> HubRevision:
    """Return the hub's repository at the commit of the first download, or at its newest one."""
    recorded = [lock.files[file.path].revision for file in data_set.archive if file.path in lock.files]
    return hub_revision(repository, "dataset", next(filter(None, recorded), "main"))


def _download(listed: Sequence[Listed], progress: Progress) -> None:
    total = sum(entry.size or 0 for entry in listed if entry.source is not None)
    before = 0
    for entry in listed:
        if entry.source is None:
            continue

        def received(size: int, before: int = before) -> None:
            progress((before + size) >> 20, total >> 20)

        transfer(entry.source, entry.path, received)
        before += entry.size or 0


def _verify(listed: Sequence[Listed], downloads: Path, progress: Progress) -> Lock:
    """Compare the digests of all files with those pinned, recorded and on the hub, and record them."""
    lock = read_lock(downloads)
    digests = input_digests([entry.path for entry in listed], str(downloads), progress)
    files = dict(lock.files)
    for entry, digest in zip(listed, digests, strict=True):
        check_digest(entry.file, entry.path, digest, lock, downloads)
        if entry.hub_sha256 not in (None, digest):
            raise DataError(f"{entry.path}: not the hub's file, its sha256 differs; remove it to download it again")
        source = entry.source.name if entry.source else ""
        known = files.get(entry.file.path)
        if known is None or source:
            files[entry.file.path] = LockedFile(
                source=source or str(entry.path),
                revision=entry.revision,
                bytes=entry.path.stat().st_size,
                sha256=digest,
            )
    write_lock(downloads, recorded := lock.model_copy(update={"files": files}))
    return recorded
