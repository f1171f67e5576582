"""The features that the benchmarks' authors released, as feature shards.

Audio is a `.npy` dict of (dim,) float32, one per clip. Visual is either such a dict of (tokens, dim), or an HDF5
file with a dataset per clip. HDF5 is read a clip at a time. A pickled dict has to be read from its beginning to
its end; so that it need not be in memory, each array goes, as it is met, into a temporary file in float16 (half
of the `.npy` file's size; TMPDIR says where), and is read from there. One array is in memory at a time.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from avcil_dist import storage
from avcil_dist.data.manifest import SPLITS, Split, check_keys
from avcil_dist.errors import ConfigError, DataError
from data_shards.build_plan import (
    FORMAT,
    WHOLE,
    BuildReport,
    Plan,
    ShardJob,
    load_finished,
    merge_parts,
    run_shard_job,
    start_part,
)
from data_shards.listings.pickled_dict import read_pickled_dict
from data_shards.listings.published_lists import PublishedLists, read_published_lists
from data_shards.rejections import ClipRejectedError, Rejection
from data_shards.shard_writer import feature_members, shard_url
from data_shards.workers import Progress

HDF5_ENDINGS = (".h5", ".hdf5")


class _Arrays(Protocol):
    """One array for each clip, somewhere on disk."""

    def __contains__(self, key: str) -> bool: ...

    def read(self, key: str) -> np.ndarray:
        """The clip's array."""


@dataclass(frozen=True)
class _Chunk:
    """The clips of one shard, before they are read."""

    job: ShardJob
    class_name: str
    split: Split
    keys: tuple[str, ...]


def import_features(
    visual: Path,
    audio: Path,
    splits: Path,
    output: str,
    *,
    frames: int,
    clips_per_shard: int,
    progress: Progress | None = None,
) -> BuildReport:
    """Write released features as feature shards at `output`, in the classes and splits of the published lists.

    A clip's visual tokens are `frames` times as many positions. Clips without features, or with features of
    another shape than the first, are listed in `rejected.csv`. What a broken run had finished is not done again.
    Raises DataError for files that cannot be read, ConfigError for numbers that do not fit, or a missing library.
    """
    lists = read_published_lists(splits)
    digest = storage.sha256(json.dumps([FORMAT, frames, clips_per_shard, _sizes(visual, audio, splits)]).encode())
    unchanged = load_finished(output, digest)
    if unchanged:
        return unchanged
    with ExitStack() as files:
        pictures, sounds = (files.enter_context(_open_arrays(path)) for path in (visual, audio))
        shape = _shape(lists, pictures, sounds, frames, visual)
        chunks, rejected = _chunks(lists, pictures, sounds, clips_per_shard, digest)
        plan = Plan("feature", lists.classes, shape, digest, tuple(chunk.job for chunk in chunks), tuple(rejected))
        numbers = start_part(output, plan, WHOLE)
        done = plan.clips - sum(plan.jobs[number].clips for number in numbers)
        for number in numbers:
            chunk, left_out = chunks[number], list[Rejection]()
            clips = _clips(chunk, pictures, sounds, shape, left_out)
            run_shard_job(output, chunk.job, chunk.class_name, chunk.split, clips, left_out)
            done += plan.jobs[number].clips
            if progress:
                progress(done, plan.clips)
    return merge_parts(output)


def _sizes(visual: Path, audio: Path, splits: Path) -> list[int]:
    paths = [visual, audio, *sorted(splits.glob("*.npy"))]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: missing")
    return [path.stat().st_size for path in paths]


@contextmanager
def _open_arrays(path: Path) -> Iterator[_Arrays]:
    if path.suffix in HDF5_ENDINGS:
        try:
            import h5py
        except ImportError:
            raise ConfigError(f"{path}: reading HDF5 needs h5py; pip install 'avcil-dist[hdf5]'") from None
        try:
            with h5py.File(path, "r") as file:
                yield _Hdf5Arrays(path, file)
        except OSError as error:
            raise DataError(f"{path}: cannot be read as HDF5 ({error})") from None
        return
    with tempfile.TemporaryFile(prefix="avcil-features-") as spool:
        yield _SpooledArrays(path, spool)


class _Hdf5Arrays:
    """A dataset per clip."""

    def __init__(self, path: Path, file: Mapping[str, np.ndarray]) -> None:
        self._path, self._file = path, file

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def read(self, key: str) -> np.ndarray:
        try:
            return np.asarray(self._file[key][()])
        except (OSError, TypeError, ValueError) as error:
            raise ClipRejectedError("corrupt", f"{self._path}: {key}: cannot be read ({error})") from None


class _SpooledArrays:
    """The arrays of a pickled dict, spooled to a file in float16 while the dict is read."""

    def __init__(self, path: Path, spool: IO[bytes]) -> None:
        self._spool = spool
        self._places: dict[str, tuple[int, tuple[int, ...]]] = read_pickled_dict(path, self._keep)

    def _keep(self, array: np.ndarray) -> tuple[int, tuple[int, ...]]:
        place = self._spool.tell()
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found when it is packed
            self._spool.write(np.ascontiguousarray(array, dtype=np.float16).tobytes())
        return place, array.shape

    def __contains__(self, key: str) -> bool:
        return isinstance(self._places.get(key), tuple)

    def read(self, key: str) -> np.ndarray:
        place, shape = self._places[key]
        self._spool.seek(place)
        data = self._spool.read(2 * math.prod(shape))
        return np.frombuffer(data, dtype=np.float16).reshape(shape)


def _shape(lists: PublishedLists, pictures: _Arrays, sounds: _Arrays, frames: int, where: Path) -> dict[str, int]:
    """The sizes of the first clip that has both features."""
    keys = (key for split in SPLITS for key in lists.labels[split] if key in pictures and key in sounds)
    first = next(keys, None)
    if first is None:
        raise DataError(f"{where}: has no clip of the lists; are they of the same benchmark?")
    dim = sounds.read(first).size
    tokens, rest = divmod(pictures.read(first).size, dim)
    if rest or tokens % frames:
        raise ConfigError(f"{where}: {first}: {tokens} tokens of {dim} numbers are not {frames} frames; give --frames")
    return {"frames": frames, "positions": tokens // frames, "dim": dim}


def _chunks(
    lists: PublishedLists, pictures: _Arrays, sounds: _Arrays, clips_per_shard: int, digest: str
) -> tuple[list[_Chunk], list[Rejection]]:
    chunks, rejected = [], []
    groups: dict[tuple[str, Split], list[str]] = {(name, split): [] for name in lists.classes for split in SPLITS}
    for split in SPLITS:
        for key, label in lists.labels[split].items():
            if key in pictures and key in sounds:
                groups[label, split].append(key)
            else:
                what = "audio" if key in pictures else "visual"
                rejected.append(Rejection(key, label, split, "missing", f"no {what} features"))
    numbers = {name: number for number, name in enumerate(lists.classes)}
    for (label, split), keys in groups.items():
        check_keys("the published lists", keys)
        for first in range(0, len(keys), clips_per_shard):
            taken = tuple(keys[first : first + clips_per_shard])
            name = shard_url(split, numbers[label], label, first // clips_per_shard).removesuffix(".tar")
            chunks.append(_Chunk(ShardJob(name, digest, len(taken)), label, split, taken))
    return chunks, rejected


def _clips(
    chunk: _Chunk, pictures: _Arrays, sounds: _Arrays, shape: Mapping[str, int], rejected: list[Rejection]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    dim, tokens = shape["dim"], shape["frames"] * shape["positions"]
    for key in chunk.keys:
        try:
            visual, audio = pictures.read(key), sounds.read(key)
            if visual.size != tokens * dim or audio.size != dim:
                said = f"features of {visual.shape} and {audio.shape}, not of {(tokens, dim)} and {(dim,)}"
                raise ClipRejectedError("format", said)
            # the clip's times are not in the files; a VGGSound key's source is what stands before its last `_`
            record = {"label": chunk.class_name, "split": chunk.split, "source": _video_of(key)}
            members = feature_members(visual.reshape(tokens, dim), audio.reshape(dim), record)
        except DataError as error:
            kind = error.kind if isinstance(error, ClipRejectedError) else "corrupt"
            rejected.append(Rejection(key, chunk.class_name, chunk.split, kind, str(error)))
            continue
        yield key, members


def _video_of(key: str) -> str:
    """The video of a key: `ID_000030` is of `ID`; any other key is its own."""
    video, _, second = key.rpartition("_")
    return video if video and len(second) == 6 and second.isdigit() else key
