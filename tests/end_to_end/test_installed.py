"""The wheel: what a user installs has the command, the shipped configurations and the page template, and imports."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import avcil_dist

ROOT = Path(__file__).parents[2]
IMPORTS = """
import importlib, pkgutil
for package in ("avcil_dist", "data_shards", "launch"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(f"{module.name}: {error}")
"""
OF_EXTRAS = ["avcil_dist.tracking.trackers.tensorboard", "avcil_dist.tracking.trackers.wandb"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves its traces where the source is
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "__pycache__"))
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    subprocess.run([str(word) for word in words], check=True, cwd=folder)
    [wheel] = folder.glob("avcil_dist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, *words: str, path: str = "") -> str:
    """The output of Python with the wheel, and the folders `path`, on its path."""
    environment = os.environ | {"PYTHONPATH": f"{site}{path}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *words], cwd=site.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def link_base_requirements(site: Path, folder: Path) -> set[str]:
    """Link what the wheel needs without extras, and what that needs, into a folder. Returns the names."""
    [wheel] = (metadata.Distribution.at(path) for path in site.glob("*.dist-info"))
    needed, waiting = set[str](), list(wheel.requires or [])
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in needed or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # such as a library of CUDA in an environment without it
            continue
        needed.add(name)
        waiting += found.requires or []
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(found.locate_file(top)))
    return needed


def test_an_installed_wheel_finds_its_configurations_from_any_directory(site: Path) -> None:
    packages = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"avcil_dist", "data_shards", "launch"}
    assert (site / "avcil_dist" / "reporting" / "report.html.j2").is_file()
    assert all((site / package / "py.typed").is_file() for package in packages)
    about = next(site.glob("*.dist-info/METADATA")).read_text()
    assert f"Version: {avcil_dist.__version__}\n" in about
    code = (
        "import launch, sys; from launch.cli.main import cli; assert launch.__file__.startswith(sys.argv.pop(1)); cli()"
    )
    assert "name: finetune" in run(site, "-c", code, str(site), "config", "show", "demo", "method=finetune")


def test_every_module_is_imported_with_the_base_requirements_alone(site: Path, tmp_path: Path) -> None:
    needed = link_base_requirements(site, tmp_path)
    assert not needed & {"flask", "boto3", "tensorboard", "wandb", "onnxruntime", "mlflow"}
    failed = run(site, "-S", "-c", IMPORTS, path=f"{os.pathsep}{tmp_path}").splitlines()  # -S: nothing else installed
    assert [line.partition(":")[0] for line in failed] == OF_EXTRAS, failed


def test_the_requirements_of_the_wheel_are_consistent_with_the_environment(site: Path) -> None:
    assert run(site, "-m", "pip", "check").strip() == "No broken requirements found."
