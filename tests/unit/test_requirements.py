"""Requirements: each imported package is declared, and the tested set of versions is in the ranges of setup.py."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).parents[2]
OWN = ("avcil_dist", "data_shards", "launch")
# Imported where they are: triton comes with torch for NVIDIA GPUs, torchcodec is compared with in a benchmark.
OPTIONAL = {"triton", "torchcodec"}
# From the records of all installed packages; those of the extra `gpu` need not be.
PROVIDERS = {"pynvml": ["nvidia-ml-py"], **packages_distributions()}
OF_EXTRAS = {
    "avcil_dist/tracking/trackers/tensorboard.py": "tensorboard",
    "avcil_dist/tracking/trackers/wandb.py": "wandb",
}


@pytest.fixture
def packaging(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `setup`."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    path = PROJECT / "setup.py"
    exec(compile(path.read_text(), str(path), "exec"), {"__file__": str(path)})
    return found


def every(packaging: dict[str, Any]) -> list[str]:
    extras = packaging["extras_require"].values()
    return [*packaging["install_requires"], *(text for extra in extras for text in extra)]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The first part of the names of the modules of others that statements import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {*OWN} - OPTIONAL


def undeclared(modules: set[str], declared: set[str]) -> set[str]:
    return {name for name in modules if not declared & {canonicalize_name(dist) for dist in PROVIDERS.get(name, ())}}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in OWN:
        for path in sorted((PROJECT / package).rglob("*.py")):
            yield str(path.relative_to(PROJECT)), ast.parse(path.read_text())


def test_every_imported_package_is_declared(packaging: dict[str, Any]) -> None:
    declared = names(every(packaging))
    for path, tree in sources():
        assert not undeclared(imported(ast.walk(tree)), declared), path


def test_every_module_can_be_imported_with_the_base_requirements(packaging: dict[str, Any]) -> None:
    for path, tree in sources():
        extra = packaging["extras_require"].get(OF_EXTRAS.get(path, ""), [])
        assert not undeclared(imported(iter(tree.body)), names([*packaging["install_requires"], *extra])), path


def test_the_tested_set_is_the_lower_end_of_the_ranges(packaging: dict[str, Any]) -> None:
    texts = set(every(packaging))
    tested = {}
    for line in (PROJECT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            tested[canonicalize_name(name)] = Version(version)
    assert tested.keys() == names(list(texts))
    for text in texts:
        requirement = Requirement(text)
        version = tested[canonicalize_name(requirement.name)]
        assert f">={version}" in {f"{spec.operator}{Version(spec.version)}" for spec in requirement.specifier}
        assert version in requirement.specifier
