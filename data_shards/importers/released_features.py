"""Importer of the features that the benchmarks' authors released; writes feature shards.

Audio is a `.npy` dict of (dim,) float32, one per clip. Visual is such a dict of (tokens, dim), or an HDF5 file with
a dataset per clip. HDF5 is read a clip at a time. A pickled dict can be read from beginning to end only: each array
is copied to a temporary file in TMPDIR, in float16 (half the size of the `.npy` file), and read from there. One
array is in memory at a time.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from avcil_dist.data.shard import KEY_PATTERN
from avcil_dist.errors import ConfigError, DataError
from data_shards.build_plan import BuildReport
from data_shards.importers.feature_importer import Arrays, ForeignFeatures
from data_shards.importers.feature_writer import write_features
from data_shards.listings.pickled_dict import read_pickled_dict
from data_shards.listings.published_lists import read_published_lists
from data_shards.rejections import ClipRejectedError
from data_shards.workers import Progress

HDF5_ENDINGS = (".h5", ".hdf5")
HDF5_FAULTS = (OSError, RuntimeError, TypeError, ValueError, LookupError, OverflowError, MemoryError)
MAX_NUMBERS = 1 << 26  # of a clip: 55 times the features of the reference setting


def import_features(
    visual: Path,
    audio: Path,
    splits: Path,
    output: str,
    *,
    frames: int,
    clips_per_shard: int,
    digest_progress: Progress | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Write released features as feature shards to `output`, in the classes and splits of the published lists.

    A clip has `frames` × positions visual tokens. Clips without features, or with features of another shape than
    the first, are listed in `rejected.csv`. Shards that an interrupted run finished are not written again, unless
    the content of a file differs. `digest_progress` is called while the files' digests are computed (MiB), `progress`
    with the number of clips done and their total. Raises DataError for files that cannot be read, ConfigError for
    numbers that do not fit, or a missing library.
    """
    lists = read_published_lists(splits)

    @contextmanager
    def open_features() -> Iterator[ForeignFeatures]:
        with _open_arrays(visual) as tokens, _open_arrays(audio) as sound:
            yield ForeignFeatures(lists.classes, lists.labels, tokens, sound, frames)

    return write_features(
        open_features,
        visual,
        [visual, audio, *sorted(splits.glob("*.npy"))],
        output,
        reader=frames,
        clips_per_shard=clips_per_shard,
        digest_progress=digest_progress,
        progress=progress,
    )


@contextmanager
def _open_arrays(path: Path) -> Iterator[Arrays]:
    if path.suffix in HDF5_ENDINGS:
        try:
            import h5py
        except ImportError:
            raise ConfigError(f"{path}: reading HDF5 needs h5py; pip install 'avcil-dist[hdf5]'") from None
        try:
            file = h5py.File(path, "r")
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as HDF5 ({' '.join(str(error).split())})") from None
        with file:
            yield _Hdf5Arrays(path, file)
        return
    with tempfile.TemporaryFile(prefix="avcil-features-") as copy:
        yield _CopiedArrays(path, copy)


class _Hdf5Arrays:
    """Arrays of an HDF5 file with a dataset per clip.

    A dataset counts if it is in the file itself: a link to another file, numbers kept in one, and a dataset made of
    others are refused, since HDF5 would read any file of this machine.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file

    def __contains__(self, key: str) -> bool:
        try:
            return KEY_PATTERN.fullmatch(key) is not None and self._file.get(key, getlink=True) is not None
        except HDF5_FAULTS:
            return False

    def read(self, key: str) -> np.ndarray:
        import h5py

        try:
            link = self._file.get(key, getlink=True)
            found = self._file.get(key) if isinstance(link, h5py.HardLink) else None
            if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
                raise ClipRejectedError("corrupt", f"{self._path}: {key}: not a dataset of this file")
            if found.dtype.kind not in "iuf" or found.dtype.itemsize > 8 or found.size > MAX_NUMBERS:
                raise ClipRejectedError("corrupt", f"{self._path}: {key}: {found.shape} of {found.dtype}")
            return np.asarray(found[()])
        except HDF5_FAULTS as error:
            fault = " ".join(str(error).split())
            raise ClipRejectedError("corrupt", f"{self._path}: {key}: cannot be read ({fault})") from None


class _CopiedArrays:
    """Arrays of a pickled dict, copied to a file in float16 while the dict is read."""

    def __init__(self, path: Path, copy: IO[bytes]) -> None:
        self._copy = copy
        self._spans: dict[str, tuple[int, tuple[int, ...]]] = read_pickled_dict(path, self._store)

    def _store(self, array: np.ndarray) -> tuple[int, tuple[int, ...]]:
        offset = self._copy.tell()
        with np.errstate(over="ignore"):  # too large values become infinite and are rejected when they are packed
            self._copy.write(np.ascontiguousarray(array, dtype=np.float16).tobytes())
        return offset, array.shape

    def __contains__(self, key: str) -> bool:
        return isinstance(self._spans.get(key), tuple)

    def read(self, key: str) -> np.ndarray:
        offset, shape = self._spans[key]
        self._copy.seek(offset)
        data = self._copy.read(2 * math.prod(shape))
        return np.frombuffer(data, dtype=np.float16).reshape(shape)
