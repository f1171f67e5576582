"""The oldest MLflow server that is supported, in an environment of its own, which is made once per machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

OLDEST = "2.7.1"
# A server without the client's machine learning packages: 25 s instead of 40 s, and a third of the size.
PACKAGES = (
    f"mlflow-skinny=={OLDEST}",
    "sqlalchemy<2.1",
    "alembic<2",
    "flask<3",
    "gunicorn",
    "querystring-parser<2",
    "docker<7",
    "pandas<3",
    "setuptools<81",  # pkg_resources, which newer ones lack
)
SECONDS = 300


def old_mlflow_python() -> str:
    """Return the interpreter of an environment with MLflow 2.7.1. Skips the test where it cannot be installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "avcil-dist", "tests")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"mlflow-{OLDEST}-python{sys.version_info.major}.{sys.version_info.minor}"
    python, done = folder / "bin" / "python", folder / "installed"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
            for command in ([sys.executable, "-m", "venv", str(folder)], install):
                _run(command)
            done.touch()
    return str(python)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"MLflow {OLDEST} cannot be installed: not within {SECONDS} s")
    if done.returncode:
        pytest.skip(f"MLflow {OLDEST} cannot be installed: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
