"""Trackers beside MLflow: TensorBoard, Weights & Biases, and those of other packages, by name.

A module `NAME.py` of this folder that defines `TRACKER` is the tracker of that name, and its extra in setup.py installs
what it imports.
"""

import importlib
from collections.abc import Collection
from pathlib import Path

from avcil_dist.errors import ConfigError
from avcil_dist.system.plugins import check_name, load_plug_in
from avcil_dist.tracking.trackers.base import Tracker

SETTING = "tracking.trackers"
BUILT_IN = ("tensorboard", "wandb")


def tracker_class(name: str) -> type[Tracker]:
    """Return the class of a tracker: built in, or of a plug-in.

    Raises ConfigError as `load_plug_in` does, for a plug-in that is no tracker, and for a package that is missing.
    """
    if name in BUILT_IN:
        check_name(SETTING, name, "trackers", BUILT_IN)
        try:
            found = importlib.import_module(f"{__name__}.{name}").TRACKER
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{SETTING}: {name} needs the package {error.name}; run pip install 'avcil-dist[{name}]'"
            ) from None
    else:
        found = load_plug_in(SETTING, name, "trackers", BUILT_IN)
    if not (isinstance(found, type) and issubclass(found, Tracker)):
        raise ConfigError(f"{SETTING}: the plug-in {name!r} is no class derived from {Tracker.__module__}.Tracker")
    return found


def check_trackers(names: Collection[str]) -> None:
    """Check that each tracker can be used. Raises ConfigError as `tracker_class` does, and for a name twice."""
    for name in names:
        tracker_class(name)
    if len(set(names)) < len(names):
        raise ConfigError(f"{SETTING}: a tracker is there twice: {', '.join(names)}")


def tracker_folder(stream_folder: Path, name: str) -> Path:
    """Return the folder of a tracker's files, of a name that may be `package.module:Class`."""
    return stream_folder / name.replace(":", ".")
