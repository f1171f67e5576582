"""Packages with plug-ins, installed as files on Python's path: their metadata, and modules that note their import."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from avcil_dist.system import plugins


def install(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    package: str,
    points: Mapping[str, Mapping[str, str]],
    code: str = "",
) -> Path:
    """Put a package with these entry points (group, name, reference) on the path. Returns its folder."""
    site = folder / f"site-{package}"
    about = site / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    sections = [
        f"[avcil_dist.{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in points.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(sections))
    (site / package).mkdir()
    (site / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setenv(plugins.VARIABLE, "")
    plugins.plug_ins.cache_clear()
    return site / package


@pytest.fixture(autouse=True)
def fresh_plug_ins() -> Iterator[None]:
    """Forget the packages of a test at its end."""
    yield
    plugins.plug_ins.cache_clear()
