"""The packages beside this one, `launch` and `data_shards`, whose names are common: another program's may hide them."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launch", "data_shards")


def fault() -> str | None:
    """Return a line that names a foreign package which hides one of this project's; None where all are this one's."""
    for name in PACKAGES:
        if found := foreign_package(name):
            return (
                f"{found} comes before the package {name!r} of avcil-dist on Python's path; remove its folder from "
                "PYTHONPATH for this command, or use an environment without it"
            )
    return None


def foreign_package(name: str) -> str | None:
    """Return the place of a module that hides the package `name` beside this one; None where nothing does."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "nothing"
    places = [str(place) for place in spec.submodule_search_locations or ()] or [str(spec.origin)]
    return None if any(Path(place).resolve() == ROOT / name for place in places) else places[0]
