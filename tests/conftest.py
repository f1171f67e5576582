"""Settings of the whole suite: markers by folder, one thread per process, no process in a fast test."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
MARKERS = {"ranks": "ranks", "services": "services", "slurm": "slurm", "gpu": "gpu", "end_to_end": "slow"}
ALLOWED = {"c++", "g++", "clang++", Path(os.environ.get("CXX", "c++")).name, "git"}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; tests interrupt their processes
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test has several ranks; two cores have no room for their threads
torch.set_num_threads(1)


class FileScheduling(LoadScopeScheduling):
    """Order of tests that run side by side (pytest -n): a file is the work of one process.

    The tests of a file share its data sets and servers. All tests of SLURM share one process: a machine has one SLURM.
    Those on a GPU share nothing: each is scheduled by itself.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        if Path(file).parent.name == "gpu":
            return nodeid
        return "slurm" if Path(file).parent.name == "slurm" else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    """Return the order of tests that run side by side: first the folders of the long ones, as they are collected."""
    config.option.loadscopereorder = False
    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder; a unit test is fast unless it is marked as slow. The tests of SLURM come first.

    They take the longest in one process.
    """
    items.sort(key=lambda item: item.path.parent.name != "slurm")
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder != "unit":
            item.add_marker(MARKERS[folder])
        elif item.get_closest_marker("slow") is None:
            item.add_marker("fast")


@pytest.fixture(scope="session")
def reference() -> Iterator[Any]:
    """The `ReferenceRun` of a short stream in plain surroundings, trained once for all tests."""
    from tests.helpers.surroundings import reference_run  # imports the command line, which many tests do not need

    folder = Path(tempfile.mkdtemp(prefix="avcil-reference-"))  # other users cannot read pytest's own folders
    yield reference_run(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone. DeepSpeed keeps the first group that it sees, and is made to forget it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name, kept in (("deepspeed.comm.comm", "cdb"), ("deepspeed.utils.groups", "_WORLD_GROUP")):
        if name in sys.modules:
            setattr(sys.modules[name], kept, None)


@pytest.fixture(autouse=True)
def environment_of_its_own() -> Iterator[None]:
    """End a test with the variables and the servers it began with: DeepSpeed and MLflow set some in this process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    for name, kept in (("_tracking_service", "_tracking_uri"), ("_model_registry", "_registry_uri")):
        if module := sys.modules.get(f"mlflow.tracking.{name}.utils"):
            setattr(module, kept, None)


@pytest.fixture(autouse=True)
def no_process_in_a_fast_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a fast test that starts a process. A compiler, once per machine, and git are the exceptions."""
    if not request.node.get_closest_marker("fast"):
        return
    start = subprocess.Popen.__init__

    def refuse(process: Any, *arguments: Any, **settings: Any) -> None:
        command = arguments[0] if arguments else None
        if isinstance(command, list) and Path(command[0]).name in ALLOWED:
            return start(process, *arguments, **settings)
        pytest.fail("a fast test must not start a process: mark it with pytest.mark.slow")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(BaseProcess, "start", refuse)
