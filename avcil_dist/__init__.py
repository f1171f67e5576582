"""Distributed audio-visual class-incremental learning.

The names of the Python API are attributes of this package (PEP 562); the first use of one imports it from
`launch/api.py`. `__init__.pyi` has their types.
"""

import importlib

__version__ = "0.1.0"
API = ("Observer", "Prediction", "Stream", "build_shards", "load_config", "load_manifest", "train")


def __getattr__(name: str) -> object:
    """Return a name of the Python API. Raises ImportError where a foreign package hides one of this project's."""
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hidden_by = importlib.import_module("avcil_dist.system.own_packages").fault()
    if hidden_by:
        raise ImportError(hidden_by)
    return getattr(importlib.import_module("launch.api"), name)


def __dir__() -> list[str]:
    """Return the names of the package, with those that are not imported yet."""
    return sorted({*globals(), *API})
