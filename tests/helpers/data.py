"""Locations of the tests' data: files of this repository, and published files outside it.

The published split lists and the real clips have no licence that allows copies here. `AVCIL_TEST_DATA` names a
folder that holds them; without it, or without one of its folders, the tests of that folder are skipped by name.
"""

import os
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"
VARIABLE = "AVCIL_TEST_DATA"
PUBLISHED = Path(os.environ[VARIABLE]).resolve() if os.environ.get(VARIABLE) else None


def needs_published(name: str) -> pytest.MarkDecorator:
    """Mark that skips a test if the folder `name` of published data is missing."""
    if PUBLISHED is None:
        return pytest.mark.skipif(True, reason=f"{VARIABLE} is not set: published data {name!r} are missing")
    return pytest.mark.skipif(not published(name).is_dir(), reason=f"{published(name)} is missing")


def published(name: str) -> Path:
    """Return the folder `name` of published data; a path that does not exist if there are none."""
    return (PUBLISHED or DATA / "published") / name
