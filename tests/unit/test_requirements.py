"""Requirements: each imported package is declared; the lowest and the locked versions are those of its ranges."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from launch.lock import LOCK, entries, part, with_uses

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


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges(packaging: dict[str, Any]) -> None:
    texts = set(every(packaging))
    lowest = {}
    for line in (PROJECT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            lowest[canonicalize_name(name)] = Version(version)
    assert lowest.keys() == names(list(texts))
    for text in texts:
        requirement = Requirement(text)
        version = lowest[canonicalize_name(requirement.name)]
        assert f">={version}" in {f"{spec.operator}{Version(spec.version)}" for spec in requirement.specifier}
        assert version in requirement.specifier


def locked(text: str) -> dict[str, Requirement]:
    """The packages of a part of the lock that hold for this Python, by name."""
    found = [Requirement(line.rstrip(" \\")) for line in text.splitlines() if line[0] not in " #"]
    return {canonicalize_name(one.name): one for one in found if not one.marker or one.marker.evaluate()}


def test_the_lock_has_a_version_in_each_range_with_hashes_and_the_extras_that_need_it(
    packaging: dict[str, Any],
) -> None:
    text = LOCK.read_text()
    for uses, lines in entries(text):
        first, *hashes = lines.split(" \\\n")
        assert uses, first
        assert hashes, first
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes), first
    versions = {name: str(one.specifier).removeprefix("==") for name, one in locked(text).items()}
    for requirement in map(Requirement, every(packaging)):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    extras = packaging["extras_require"]
    for extra, requirements in {"": [], **extras}.items():
        needed = names([*packaging["install_requires"], *requirements])
        assert needed <= locked(part(text, [extra] if extra else [])).keys(), extra
    with pytest.raises(ValueError, match="no such extra: gone"):
        part(text, ["s3", "gone"])


def test_the_lock_has_all_that_the_locked_packages_need() -> None:
    """Where the installed version is the locked one, as it is with the lowest versions, on this Python."""
    found = locked(part(LOCK.read_text(), ["test"]))
    installed = {canonicalize_name(one.name): one.version for one in metadata.distributions()}
    for name, locked_one in found.items():
        if str(locked_one.specifier) != f"=={installed.get(name)}":
            continue
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            [pin] = found[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(pin.version, prereleases=True), (name, line)


def test_a_condition_that_all_packages_have_is_left_out_of_the_lock() -> None:
    compiled = (
        "mkdocs==1 ; python_version < '4' and a == 'b' \\\n    --hash=sha256:0\n"
        "torch==2.14.1 ; python_version < '4' \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\n"
    )
    text = with_uses(compiled, {"base": {"torch"}, "docs": {"torch", "mkdocs"}})
    assert part(text, []) == "torch==2.14.1 \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\n"
    assert part(text, ["docs"]).startswith("mkdocs==1 ; python_version < '4' and a == 'b' \\\n")
