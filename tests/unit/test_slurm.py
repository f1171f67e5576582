"""The SLURM scheduler with the output of squeue and sacct given."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avcil_dist.compose import load_config
from avcil_dist.errors import SchedulerError
from avcil_dist.streams.stream import stream_url
from launch.cluster.chain_record import Chain, read_chain
from launch.cluster.mark_failed import mark_failed
from launch.cluster.rank_entry import RankEntry
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers import slurm
from launch.cluster.schedulers.base import JobStart, scheduler_of
from launch.step_run import StepRun

SQUEUE = """\
90|vs100-0a1b2c-step_000|COMPLETING|node1|None
101|vs100-0a1b2c-step_001|RUNNING|node[1-2]|None
99|vs100-0a1b2c-step_002|PENDING||Dependency
7|vs100-0a1b2c-extra-step_001|RUNNING|node3|None
8|other|RUNNING|node4|None
9|vs100-0a1b2c-step_003|PENDING"""
SACCT = """\
80|vs100-0a1b2c-step_000|COMPLETED|node1|0:0
81|vs100-0a1b2c-step_001|CANCELLED by 1000|None assigned|0:15
82|vs100-0a1b2c-step_002|FAILED|node[1-2]|2:0"""


def chain(folder: Path, **jobs: tuple[str, ...]) -> Chain:
    recorded = {int(step.removeprefix("step_")): ids for step, ids in jobs.items()}
    return Chain("slurm", "vs100-0a1b2c", str(folder), num_steps=4, jobs=recorded)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The commands that are run, of which squeue and sacct print the lines above."""
    run: list[Sequence[str]] = []

    def answer(command: Sequence[str]) -> list[str]:
        run.append(command)
        return {"squeue": SQUEUE, "sacct": SACCT}.get(command[0], "").splitlines()

    monkeypatch.setattr(slurm, "_run", answer)
    return run


def test_live_jobs_are_those_of_the_chain(commands: list[Sequence[str]], tmp_path: Path) -> None:
    live = scheduler_of("slurm").live_jobs("runs/vs100", chain(tmp_path))
    assert {step: (job.id, job.state, job.nodes, job.is_live) for step, job in live.items()} == {
        0: ("90", "COMPLETING", "node1", True),
        1: ("101", "RUNNING", "node[1-2]", True),
        2: ("99", "PENDING", "", True),
    }


def test_the_recorded_job_of_a_step_comes_before_another_of_its_name(
    commands: list[Sequence[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.SQUEUE", f"{SQUEUE}\n50|vs100-0a1b2c-step_001|COMPLETING|node9|None")
    for recorded in ("101", "50"):
        live = scheduler_of("slurm").live_jobs("runs/vs100", chain(tmp_path, step_1=("40", recorded)))
        assert live[1].id == recorded


def test_past_jobs_are_the_newest_of_each_step(commands: list[Sequence[str]], tmp_path: Path) -> None:
    recorded = chain(tmp_path, step_0=("80",), step_1=("70", "81"), step_2=("82",))
    past = scheduler_of("slurm").past_jobs(recorded, [1, 2, 3])
    assert commands[0][4] == "--jobs=81,82"
    assert {step: (job.state, job.nodes, job.reason, job.is_live) for step, job in past.items()} == {
        1: ("CANCELLED", "", "exit code 0", False),
        2: ("FAILED", "node[1-2]", "exit code 2", False),
    }
    assert scheduler_of("slurm").past_jobs(recorded, [3]) == {}
    assert len(commands) == 1


def test_a_cluster_without_accounting_has_no_past_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(command: Sequence[str]) -> list[str]:
        raise SchedulerError("sacct: Slurm accounting storage is disabled")

    monkeypatch.setattr(slurm, "_run", refuse)
    assert scheduler_of("slurm").past_jobs(chain(tmp_path, step_0=("80",)), [0]) == {}


def test_later_jobs_are_cancelled_first_and_no_others(commands: list[Sequence[str]], tmp_path: Path) -> None:
    assert scheduler_of("slurm").cancel(chain(tmp_path)) == 3
    assert commands[-1] == ["scancel", "101", "99", "90"]
    assert scheduler_of("slurm").cancel(chain(tmp_path), first_step=2) == 1
    assert commands[-1] == ["scancel", "99"]
    assert scheduler_of("slurm").cancel(chain(tmp_path), first_step=3) == 0
    assert commands[-1][0] == "squeue"


def test_a_job_is_submitted_without_the_status_of_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, record = load_config("demo", [f"output={tmp_path}"]), replace(chain(tmp_path), code="/code")
    mark_failed(record.folder, 2, "an earlier error")
    given: dict[str, Any] = {}

    class Executor:
        def __init__(self, folder: Path) -> None:
            given["folder"] = folder

        def update_parameters(self, **parameters: Any) -> None:
            given["parameters"] = parameters

        def submit(self, entry: RankEntry) -> SimpleNamespace:
            assert record.failure(2) is None
            given["entry"] = entry
            return SimpleNamespace(job_id=4711)

    monkeypatch.setattr("submitit.SlurmExecutor", Executor)
    cluster = ClusterConfig(kind="slurm", partition="gpu")
    record = scheduler_of("slurm").submit(config, cluster, record, [2], JobStart("id", first_step=2, after="9"))
    assert record.jobs == {2: ("4711",)}
    run = StepRun(config, 2, 4, "id", False, f"{tmp_path}/step_002.json")
    assert given["entry"] == RankEntry(run, str(tmp_path), "slurm")
    assert given["folder"] == tmp_path / "step_002"
    names = ("job_name", "partition", "dependency")
    assert [given["parameters"][name] for name in names] == ["vs100-0a1b2c-step_002", "gpu", "afterany:9"]


def test_each_job_waits_for_the_one_before_it_and_is_recorded_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = load_config("demo", [f"output={tmp_path}"])
    submitted: list[tuple[int, str | None, bool, Any]] = []

    def submit(run: StepRun, cluster: ClusterConfig, record: Chain, dependency: str | None) -> str:
        submitted.append((run.step, dependency, run.reset_optimizer, run.progress_file))
        if run.step == 3:
            raise SchedulerError("sbatch refuses")
        return f"10{run.step}"

    monkeypatch.setattr(slurm, "_sbatch", submit)
    start = JobStart("id", first_step=1, after="77", reset_optimizer=True)
    record, cluster = chain(tmp_path), ClusterConfig(kind="slurm")
    with pytest.raises(SchedulerError):
        scheduler_of("slurm").submit(config, cluster, record, [1, 2, 3], start)
    assert submitted == [
        (1, "afterany:77", True, f"{tmp_path}/step_001.json"),
        (2, "afterok:101", False, f"{tmp_path}/step_002.json"),
        (3, "afterok:102", False, f"{tmp_path}/step_003.json"),
    ]
    assert read_chain(stream_url(config)).jobs == {1: ("101",), 2: ("102",)}
    submitted.clear()
    scheduler_of("slurm").submit(config, cluster, record, [1], JobStart("id", first_step=1))
    assert submitted[0][1:3] == (None, False)
