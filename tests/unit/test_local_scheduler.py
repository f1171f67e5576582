"""Chains on this machine: ranks and their supervisor."""

import os

import pytest

from avcil_dist.errors import RankError
from launch.cluster.schedulers.local import SCHEDULER


def test_a_rank_does_not_start_when_its_controller_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GLOBALID": 1, "NTASKS": 2, "JOB_ID": os.getppid()}.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", str(value))
    world = SCHEDULER.world(7)
    assert (world.rank, world.size, world.master_port) == (1, 2, 7)
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", str(os.getpid()))  # its parent is another process by now
    with pytest.raises(RankError, match="the supervisor of this rank has ended"):
        SCHEDULER.world(7)
