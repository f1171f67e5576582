"""Base class of importers of features: a plug-in that reads the features of a data set of another layout."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from avcil_dist.data.shard import Split


class Arrays(Protocol):
    """Arrays by the key of a clip, of any shape and any real type."""

    def __contains__(self, key: str) -> bool:
        """Whether there is an array of this key."""

    def read(self, key: str) -> np.ndarray:
        """Return the array. Raises ClipRejectedError for one that cannot be read; its clip is left out."""


@dataclass(frozen=True)
class ForeignFeatures:
    """Features of a data set: its classes in order, the class of each clip by split and key, and the arrays.

    A clip has `frames` × positions visual tokens, in this order, of as many numbers as its sound has.
    """

    classes: tuple[str, ...]
    labels: Mapping[Split, Mapping[str, str]]
    visual: Arrays
    audio: Arrays
    frames: int


class FeatureImporter(ABC):
    """Reader of a layout of features, for `avcil shards build SOURCE OUTPUT --importer NAME`."""

    @abstractmethod
    def files(self, path: Path) -> list[Path]:
        """Return the files at `path` that are read. A change of their content begins the import anew."""

    @abstractmethod
    def open(self, path: Path) -> ForeignFeatures:
        """Open the features at `path`. Raises DataError, naming the file, for faulty ones."""
