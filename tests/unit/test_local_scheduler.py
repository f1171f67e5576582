"""Chains on this machine: ranks and their supervisor."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from avcil_dist.errors import RankError
from launch.cluster.schedulers import local_supervisor
from launch.cluster.schedulers.local import LOCK, PID, SCHEDULER, is_supervised, supervising
from launch.cluster.schedulers.local_supervisor import Supervisor


def test_a_rank_does_not_start_when_its_controller_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GLOBALID": 1, "NTASKS": 2, "JOB_ID": os.getppid()}.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", str(value))
    world = SCHEDULER.world(7)
    assert (world.rank, world.size, world.master_port) == (1, 2, 7)
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))  # its parent is another process by now
    with pytest.raises(RankError, match="the supervisor of this rank has ended"):
        SCHEDULER.world(7)


def test_a_chain_waits_for_each_of_the_others_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def is_supervised(folder: str) -> bool:
        looks.append(folder)
        return looks.count(folder) <= {"one": 0, "two": 2}[folder]

    monkeypatch.setattr(Supervisor, "__init__", lambda self: None)
    monkeypatch.setattr(Supervisor, "_run_step", lambda self, step: False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(local_supervisor, "is_supervised", is_supervised)
    supervisor = Supervisor()  # type: ignore[call-arg]
    supervisor.stop_requested, supervisor.first_step = False, 0
    supervisor.chain = SimpleNamespace(num_steps=1)  # type: ignore[assignment]
    supervisor.run(["one", "two"])
    assert looks == ["one", "two", "two", "two"]  # a chain that has ended may be submitted again, and wait for this one


def test_probes_of_a_supervisor_neither_see_nor_refuse_one_another(tmp_path: Path) -> None:
    assert not is_supervised(str(tmp_path))
    with (tmp_path / LOCK).open("w") as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        assert not is_supervised(str(tmp_path))
        end = threading.Timer(0.3, fcntl.flock, (probe, fcntl.LOCK_UN))
        end.start()
        with supervising(str(tmp_path)):  # it waits for the end of the probe
            end.join()
            assert is_supervised(str(tmp_path))
            assert (tmp_path / PID).read_text() == str(os.getpid())
    assert not is_supervised(str(tmp_path))
