"""Sandbox of these tests: a real SLURM of two nodes, started once."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.sandbox.cluster import HOSTS, PACKAGES, SYSTEM_PATHS, Sandbox


def missing() -> str | None:
    """Return why the sandbox cannot be started on this machine, None if it can."""
    path = f"{os.environ['PATH']}:{SYSTEM_PATHS}"
    packages = sorted({package for command, package in PACKAGES.items() if not shutil.which(command, path=path)})
    if packages:
        return f"needs {', '.join(packages)}: bash launch/system.sh"
    return None if os.geteuid() == 0 else "the sandbox's SLURM is started by root"


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """A running sandbox, selected by SLURM_CONF. Nothing of it is left afterwards."""
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="avcil-slurm-"))  # a socket's path must be short
    found = Sandbox(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(found.conf)
    try:
        found.up()
        yield found
    finally:
        found.down()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
    assert set(found.status().values()) == {None}
    assert not found.leftovers()
    assert str(folder) not in HOSTS.read_text()
    shutil.rmtree(folder)
