"""The wheel: what a user installs has the command, the shipped configurations and the page template."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import avcil_dist

ROOT = Path(__file__).parents[2]


def test_an_installed_wheel_finds_its_configurations_from_any_directory(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves its traces where the source is
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "__pycache__"))
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run([str(word) for word in words], check=True, cwd=tmp_path)
    [wheel] = tmp_path.glob("avcil_dist-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packages = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"avcil_dist", "data_shards", "launch"}
    assert (site / "avcil_dist" / "reporting" / "report.html.j2").is_file()
    assert all((site / package / "py.typed").is_file() for package in packages)
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    assert f"Version: {avcil_dist.__version__}\n" in metadata
    code = (
        "import launch, sys; from launch.cli.main import cli; assert launch.__file__.startswith(sys.argv.pop(1)); cli()"
    )
    words = [sys.executable, "-c", code, site, "config", "show", "demo", "method=finetune"]
    shown = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert "name: finetune" in shown.stdout, shown.stderr
