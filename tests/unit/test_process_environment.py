"""Environment of this package's own processes, and the number of ranks that a launcher permits."""

import multiprocessing
import tempfile
from pathlib import Path

import pytest

from avcil_dist.errors import WorldError
from avcil_dist.world import World
from launch import socket_folder
from launch.environments import own_environment
from launch.local_worlds import launcher_world, num_ranks
from launch.socket_folder import set_short_socket_folder

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
ALONE = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def test_own_processes_import_nothing_of_the_working_folder_and_keep_what_the_user_means() -> None:
    outer = {
        "PYTHONPATH": ":/a::/b:.:/a",
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "HTTP_PROXY": "p",
        "HOME": "/h",
    }
    assert own_environment(outer) == {"PYTHONPATH": "/a:/b", "PYTHONSAFEPATH": "1", "HTTP_PROXY": "p", "HOME": "/h"}
    assert own_environment({}) == {"PYTHONSAFEPATH": "1"}
    assert own_environment({"PYTHONPATH": ""}, root="/c") == {"PYTHONPATH": "/c", "PYTHONSAFEPATH": "1"}
    assert own_environment({"PYTHONWARNINGS": "ignore"})["PYTHONWARNINGS"] == "ignore"


def test_a_launcher_and_a_number_of_processes_must_agree() -> None:
    assert launcher_world({}, 4) == launcher_world({}, None) == World()
    assert launcher_world(TORCHRUN, None) == launcher_world(TORCHRUN, 2)
    assert launcher_world(TORCHRUN, 2).rank == 1
    with pytest.raises(WorldError, match="--processes 4: torchrun started 2 ranks, and this is rank 1 of them; leave"):
        launcher_world(TORCHRUN, 4)
    assert launcher_world(ALONE, None).launcher == "torchrun"
    assert launcher_world(ALONE, 2) == World()  # one rank of a launcher, which starts two of its own
    assert [num_ranks({}, None), num_ranks({}, 3), num_ranks(TORCHRUN, None), num_ranks(ALONE, 3)] == [1, 3, 2, 3]


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(tempfile, "tempdir", None)
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.setitem(config, "tempdir", config.get("tempdir"))
    return monkeypatch


def sockets_of_this_process() -> str | None:
    folder: str | None = multiprocessing.process.current_process()._config["tempdir"]  # type: ignore[attr-defined]
    return folder


def test_a_long_temporary_folder_has_its_sockets_elsewhere(
    temporary_folder: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = sockets_of_this_process()
    short = tmp_path / "s"
    short.mkdir()
    temporary_folder.setenv("TMPDIR", tempfile.gettempdir())
    set_short_socket_folder()
    assert sockets_of_this_process() == before
    long = tmp_path / ("x" * 100)
    long.mkdir()
    temporary_folder.setattr(tempfile, "tempdir", str(long))
    temporary_folder.setattr(socket_folder, "SHORT_FOLDERS", (str(tmp_path / "gone"), str(short)))
    set_short_socket_folder()
    assert Path(str(sockets_of_this_process())).parent == short
    assert tempfile.gettempdir() == str(long)
    temporary_folder.setattr(socket_folder, "SHORT_FOLDERS", (str(tmp_path / "gone"),))
    with pytest.raises(
        WorldError, match=r"TMPDIR=.*x is too long for the sockets of worker processes \(\d+ bytes, at most 75"
    ):
        set_short_socket_folder()
