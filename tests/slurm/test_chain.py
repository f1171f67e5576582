"""A stream as SLURM jobs on two nodes: with every disturbance the bits of the local run."""

import os
import re
import signal
from pathlib import Path

import pytest

from avcil_dist.tracking.client import find_stream
from launch.cluster.status import chain_status
from launch.sandbox.cluster import NODES, Sandbox
from tests.helpers.chains import (
    hold_ranks,
    job_of,
    kill_daemon_of_node,
    limit_time,
    no_job_starts,
    ranks_of,
    wait_for_end,
    wait_for_restart,
    wait_until_it_trains,
)
from tests.helpers.commands import PROJECT
from tests.helpers.foreign_methods import SLOW_AVCIL
from tests.helpers.sent_events import uri_of
from tests.helpers.streams import avcil, last_artifact, train, weights_digest, write_config

DEAF = """
import signal
handle = signal.signal
handle(signal.SIGUSR2, signal.SIG_IGN)
signal.signal = lambda number, handler: None if number == signal.SIGUSR2 else handle(number, handler)
"""
TESTS = f"cluster.setup=[export PYTHONPATH={PROJECT}]"  # the jobs import the slow method
TWO_NODES = ("--cluster", "slurm", "cluster.nodes=2", "cluster.cpus_per_task=1", TESTS)


def submit(config: Path, *words: object) -> str:
    """Submit a stream. Returns its folder."""
    result = avcil("submit", config, *TWO_NODES, *words)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[-1].split(":")[0]


def high_priority_job(sandbox: Sandbox) -> None:
    """Submit a job that takes both nodes for a moment."""
    words = ("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null")
    sandbox.run("sbatch", *words, "--wrap=sleep 1")


def test_a_disturbed_chain_ends_with_the_bits_of_the_local_run(sandbox: Sandbox, tmp_path: Path) -> None:
    optim = {"epochs": 60, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": 0.0005}
    config = write_config(tmp_path, method=SLOW_AVCIL, optim=optim, snapshot={"every_iterations": 20})
    whole = train(config, "method=avcil", f"output={tmp_path}/local", "-n", 2)

    stream = submit(config, "cluster.signal_seconds=60")
    jobs = [job_of(stream, step) for step in range(3)]
    sandbox.run("scontrol", "update", f"job={jobs[1]}", "Partition=nowarn")
    assert "waits or runs already" in avcil("submit", config, *TWO_NODES, "cluster.signal_seconds=60").output
    assert "cluster.signal_seconds=60, not 120; end them first" in avcil("submit", config, *TWO_NODES).output

    wait_until_it_trains(stream, 0)
    high_priority_job(sandbox)  # preemption with a warning
    wait_for_restart(sandbox, jobs[0], 1)
    wait_until_it_trains(stream, 0)
    sandbox.run("scancel", "--signal=USR2", jobs[0])
    wait_for_restart(sandbox, jobs[0], 2)

    wait_until_it_trains(stream, 1)
    high_priority_job(sandbox)  # preemption without a warning
    wait_for_restart(sandbox, jobs[1], 1)
    wait_until_it_trains(stream, 1)
    kill_daemon_of_node(sandbox, jobs[1])
    wait_for_restart(sandbox, jobs[1], 2)
    wait_until_it_trains(stream, 1)
    sandbox.run("scontrol", "requeue", jobs[1])

    wait_until_it_trains(stream, 2)
    hold_ranks(sandbox, jobs[2])  # otherwise they end before the shortest time limit
    limit_time(sandbox, jobs[2])
    wait_for_restart(sandbox, jobs[2], 1)

    steps = wait_for_end(stream)
    assert [step.state for step in steps] == ["COMMITTED"] * 3
    log = avcil("logs", stream, "--step", 2).output
    assert "step 2 stopped after" in log
    assert "requeued, it continues from its last snapshot" in log
    assert [job_of(stream, step) for step in range(3)] == jobs  # no job was submitted twice
    assert weights_digest(stream) == weights_digest(whole)
    assert last_artifact(stream).metrics == last_artifact(whole).metrics
    assert "all steps are committed" in avcil("submit", config, *TWO_NODES).output


def test_ranks_that_do_not_react_are_requeued_in_time_and_fail_in_the_end(sandbox: Sandbox, tmp_path: Path) -> None:
    optim = {"epochs": 100_000, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16}
    config = write_config(tmp_path, method=SLOW_AVCIL, optim=optim, snapshot={"every_iterations": 20})
    (tmp_path / "deaf").mkdir()
    (tmp_path / "deaf" / "sitecustomize.py").write_text(DEAF)  # the ranks ignore the warning of the time limit
    deaf = f"cluster.setup=[export PYTHONPATH={tmp_path}/deaf:{PROJECT}]"
    stream = submit(config, "cluster.hours=0.033", "cluster.signal_seconds=20", "cluster.max_requeues=1", deaf)
    job = job_of(stream, 0)
    wait_for_restart(sandbox, job, 1)
    wait_until_it_trains(stream, 0)
    log = avcil("logs", stream, "--step", 0).output
    assert "step 0 is not done (the ranks do not react, and the time limit is near); requeued" in log
    for rank in ranks_of(sandbox, job):
        os.kill(rank, signal.SIGKILL)
    assert [step.state for step in wait_for_end(stream)] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "step 0 is not done after 2 starts" in avcil("status", stream).output
    assert "jobs write to no SQLite database" in avcil("status", stream).output
    assert avcil("sync", stream).exit_code == 0
    found = find_stream(uri_of(str(tmp_path / "runs")), Path(stream).name)
    assert found.run.info.status == "FAILED"
    assert found.steps[0].info.status == "FAILED"


def test_a_failing_step_cancels_the_rest_and_status_says_why(sandbox: Sandbox, tmp_path: Path) -> None:
    optim = {"epochs": 1000, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": 0.003}
    config = write_config(tmp_path, optim=optim, snapshot={"every_iterations": 20})
    stream = submit(config)
    broken = tmp_path / "shards" / "manifest.json"
    whole = broken.read_text()
    broken.write_text("{}")  # before the first job has begun to read it
    assert [step.state for step in wait_for_end(stream)] == ["FAILED", "CANCELLED", "CANCELLED"]
    shown = avcil("status", stream).output
    assert "manifest.json" in shown
    assert [step.reason for step in chain_status(stream).steps][1:] == ["step 0 failed"] * 2
    assert "manifest.json" in avcil("logs", stream, "--step", 0).output

    broken.write_text(whole)  # repaired, submitted again, and cancelled, which ends all jobs
    first = job_of(stream, 0)
    submit(config)
    assert job_of(stream, 0) != first
    result = avcil("submit", config, *TWO_NODES, "optim.lr=0.1")
    assert result.exit_code == 2
    assert "optim.lr=0.003, not 0.1" in result.output
    wait_until_it_trains(stream, 0)
    assert "3 ended" in avcil("cancel", stream).output
    assert [step.state for step in wait_for_end(stream)] == ["CANCELLED"] * 3
    assert re.search(r"step 0: cancelled; continues from \d+\n", avcil("status", stream).output)
    assert "nothing waits or runs" in avcil("cancel", stream).output


def test_a_sweep_runs_no_more_chains_at_a_time_than_max_parallel(sandbox: Sandbox, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with no_job_starts(sandbox):
        words = ("method=finetune,lwf", "seed=1,2", "cluster.max_parallel=2")
        result = avcil("sweep", config, *words, *TWO_NODES)
        assert result.exit_code == 0, result.output
        streams = [
            str(tmp_path / "runs" / f"tiny-{name}")
            for name in ("finetune-seed1", "finetune-seed2", "lwf-seed1", "lwf-seed2")
        ]
        waits_for = {
            job: sandbox.run("squeue", "--noheader", "--format=%E", f"--jobs={job}").stdout.split("(")[0].strip()
            for stream in streams
            for job in (job_of(stream, 0), job_of(stream, 1))
        }
        assert waits_for == {
            job_of(streams[0], 0): "",
            job_of(streams[1], 0): "",
            job_of(streams[2], 0): f"afterany:{job_of(streams[0], 2)}",
            job_of(streams[3], 0): f"afterany:{job_of(streams[1], 2)}",
        } | {job_of(stream, 1): f"afterok:{job_of(stream, 0)}" for stream in streams}
        assert result.output.count("3 submitted") == 4
        assert avcil("sweep", config, *words, *TWO_NODES).output.count("0 submitted, 3 wait or run already") == 4
        shown = avcil("status", tmp_path / "runs").output
        assert all(Path(stream).name in shown for stream in streams)
        assert avcil("cancel", tmp_path / "runs").output.count(": 3 ended\n") == 4
        assert not sandbox.run("squeue", "--noheader", "--states=PENDING,RUNNING").stdout


def test_the_sandbox_is_started_once_and_shows_what_runs(sandbox: Sandbox) -> None:
    before = sandbox.status()
    assert None not in before.values()
    result = avcil("sandbox", "up", "--folder", sandbox.folder)
    assert result.exit_code == 0, result.output
    assert f"export SLURM_CONF={sandbox.conf}" in result.output
    assert sandbox.status() == before
    shown = avcil("sandbox", "status", "--folder", sandbox.folder).output
    for name in (*before, *NODES):
        assert name in shown


def test_a_sandbox_that_was_never_started_is_not_running(sandbox: Sandbox, tmp_path: Path) -> None:
    before = sandbox.status()
    result = avcil("sandbox", "down", "--folder", tmp_path / "never")
    assert (result.exit_code, result.output) == (0, f"{tmp_path}/never: nothing runs\n")
    assert sandbox.status() == before
    assert avcil("sandbox", "status", "--folder", tmp_path / "never").exit_code == 1
    assert not (tmp_path / "never").exists()


def test_the_sandbox_names_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("launch.sandbox.cluster.SYSTEM_PATHS", "")
    result = avcil("sandbox", "up", "--folder", tmp_path)
    assert result.exit_code == 2
    assert "mariadb-server, munge, slurm-wlm, slurmdbd" in result.output
    assert "bash launch/system.sh" in result.output
