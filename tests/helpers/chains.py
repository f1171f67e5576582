"""Chains of jobs in tests: wait for their states, and disturb them."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from launch.cluster.chain_record import read_chain
from launch.cluster.status import StepStatus, chain_status
from launch.sandbox.cluster import Sandbox
from launch.sandbox.daemons import processes_with

SECONDS = 400


def wait_for(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.3)


@contextmanager
def no_job_starts(sandbox: Sandbox) -> Iterator[None]:
    """Jobs of the default partition wait while the block runs."""
    sandbox.run("scontrol", "update", "PartitionName=low", "State=DOWN")
    try:
        yield
    finally:
        sandbox.run("scontrol", "update", "PartitionName=low", "State=UP")


def wait_for_end(stream: str) -> list[StepStatus]:
    """Wait until no step waits or runs. Returns the steps."""
    wait_for(lambda: not any(step.is_live for step in chain_status(stream).steps), f"the end of {stream}")
    return list(chain_status(stream).steps)


def job_of(stream: str, step: int) -> str:
    return read_chain(stream).jobs[step][-1]


def wait_until_it_trains(stream: str, step: int) -> None:
    """Wait until the step has made progress since the call: it trains, and has a snapshot to continue from."""
    progress = Path(read_chain(stream).progress_file(step))
    before = progress.read_text() if progress.exists() else ""

    def has_progress() -> bool:
        return progress.exists() and progress.read_text() != before and json.loads(progress.read_text())["done"] > 1

    wait_for(has_progress, f"step {step} of {stream} to train")


def restarts(sandbox: Sandbox, job: str) -> int:
    """Return how often SLURM has restarted the job."""
    shown = sandbox.run("scontrol", "show", "job", "-o", job).stdout
    return int(shown.partition("Restarts=")[2].split()[0])


def wait_for_restart(sandbox: Sandbox, job: str, number: int) -> None:
    wait_for(lambda: restarts(sandbox, job) >= number, f"job {job} to be requeued for the {number}th time")


def limit_time(sandbox: Sandbox, job: str) -> None:
    """Set the job's time limit to one to two minutes from now: SLURM counts in minutes."""
    shown = sandbox.run("scontrol", "show", "job", "-o", job).stdout
    hours, minutes = shown.partition("RunTime=")[2].split(":")[:2]
    sandbox.run("scontrol", "update", f"job={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")


def kill_daemon_of_node(sandbox: Sandbox, job: str) -> None:
    """Kill the slurmstepd of one node's rank with SIGKILL."""
    os.kill(psutil.Process(ranks_of(sandbox, job)[0]).ppid(), signal.SIGKILL)


def hold_ranks(sandbox: Sandbox, job: str) -> None:
    """Stop the job's ranks until SLURM sends SIGCONT, which precedes its warning of the time limit."""
    for rank in ranks_of(sandbox, job):
        os.kill(rank, signal.SIGSTOP)


def ranks_of(sandbox: Sandbox, job: str) -> list[int]:
    """Return the processes of a job's two ranks; another sandbox may have a job with the same id."""
    found = processes_with(f"SLURM_CONF={sandbox.conf}", f"SLURM_JOB_ID={job}", "SLURM_PROCID=")
    ranks = [pid for pid in found if psutil.Process(pid).cmdline()[1:4] == ["-u", "-m", "launch.cluster.rank_main"]]
    assert len(ranks) == 2
    return ranks
