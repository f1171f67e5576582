"""Sources of the published data sets: split lists, features and VGGSound's csv, each file with its place and digest.

A file has the same path in every mirror: that of the authors' repository, or of the hub. `sha256` is pinned where it is
known from the published files; the digest of any other file is recorded by the first download (`lock.py`).
"""

from dataclasses import dataclass, replace
from typing import Literal

from avcil_dist.errors import ConfigError
from data_shards.listings.published_lists import PUBLISHED_FILES

DataSetName = Literal["ave", "ks", "vs100", "vggsound-lists"]

LISTS_COMMIT = "430c7044324cdc8d4ae9e8e1ede69a30a1891b71"
LISTS_URL = f"https://raw.githubusercontent.com/weiguoPian/AV-CIL_ICCV2023/{LISTS_COMMIT}"
VGGSOUND_URL = "https://raw.githubusercontent.com/hche11/VGGSound/master"  # a branch: no commit is known to be final
FEATURES_REPOSITORY = "wiberg/AV-CIL_features"  # a data set on the hub
FRAMES = 8  # of the published features: 1,568 tokens are 8 frames of 196 positions


@dataclass(frozen=True)
class SourceFile:
    """A published file. `url` is its own; a file of the hub has none, and a `repository` instead."""

    path: str
    url: str | None = None
    repository: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A published data set: its files, and the names of `configs/benchmark` and of its folder.

    `archive` lists the parts of one zip of features; it is empty where the data set is lists only.
    """

    name: DataSetName
    title: str
    folder: str
    lists: tuple[SourceFile, ...]
    archive: tuple[SourceFile, ...] = ()
    needs_hdf5: bool = False
    benchmark: str | None = None

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All files, the small ones first."""
        return (*self.lists, *self.archive)

    def without_features(self) -> "DataSet":
        """Return the data set with its lists alone."""
        return replace(self, archive=(), needs_hdf5=False)


def _lists(folder: str, digests: tuple[str, str, str]) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(f"data/{folder}/{name}", url=f"{LISTS_URL}/data/{folder}/{name}", sha256=digest)
        for name, digest in zip(PUBLISHED_FILES, digests, strict=True)
    )


def _archive(name: str, parts: str = "") -> tuple[SourceFile, ...]:
    names = [f"{name}.a{letter}" for letter in parts] or [name]
    return tuple(SourceFile(part, repository=FEATURES_REPOSITORY) for part in names)


DATA_SETS = {
    data_set.name: data_set
    for data_set in (
        DataSet(
            "ave",
            "AVE: features of 4,079 clips, 28 classes",
            "runs/ave",
            _lists(
                "AVE",
                (
                    "d65fd73899eb662d0cba81179941c7981cd8c5b78d701061e6187b74497cdc90",
                    "c04d6d47d2d99d79544029629e2205d940114b42d096bd46f782bfd3976e79b8",
                    "a68b0eb9b6c1a840cfe18e033126244499311ad252593a1e9ef7ffd6ae4820e5",
                ),
            ),
            _archive("AVE_features.zip"),
            benchmark="ave_ci",
        ),
        DataSet(
            "ks",
            "Kinetics-Sounds: features of 23,125 clips, 30 classes",
            "runs/ks",
            _lists(
                "kinetics-sounds",
                (
                    "2269dc1c6aed27a7ece90a509a94a27a5a0f4a74817dd70078d51ffd3db001d3",
                    "3b8e3b4657a4b20141b194f6cec9c5cb648cbb636787a4de1806c1facfc943c8",
                    "42fb227c552d2ee1b91cde9ebf5894ad6ecc621e8c83ead21a99e2ad561b2a83",
                ),
            ),
            _archive("KS_features.zip", "abc"),
            needs_hdf5=True,
            benchmark="ks_ci",
        ),
        DataSet(
            "vs100",
            "VGGSound100: features of 61,195 clips, 100 classes",
            "runs/vs100",
            _lists(
                "VGGSound_100",
                (
                    "24ca3c64b5f292c061d8eee71f90d4ff08fa1b4a42afd2b96b0691511f4fe93a",
                    "1023cae09011b6719c356cdbc62a184d672f38424c3c60e41f24fdc37247d1a4",
                    "959fea6b6d2e531aea5b6819f09702f412fee8b4d68b3ca6658376af7b55d043",
                ),
            ),
            _archive("VS100_features.zip", "abcdef"),
            needs_hdf5=True,
            benchmark="vs100_ci",
        ),
        DataSet(
            "vggsound-lists",
            "VGGSound: the csv of its 199,176 clips, 309 classes",
            "runs/vggsound",
            (SourceFile("data/vggsound.csv", url=f"{VGGSOUND_URL}/data/vggsound.csv"),),
        ),
    )
}


def data_set_of(name: str) -> DataSet:
    """Return a data set by name. Raises ConfigError for a name that is none."""
    for known in DATA_SETS.values():
        if known.name == name:
            return known
    raise ConfigError(f"{name}: no data set that can be downloaded; choose {', '.join(DATA_SETS)}")
