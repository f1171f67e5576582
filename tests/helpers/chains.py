"""Chains of jobs in tests: waiting for what happens to them, and disturbing them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from launch.cluster.chain_record import read_chain
from launch.cluster.status import StepStatus, chain_status
from launch.sandbox.cluster import Sandbox
from launch.sandbox.daemons import processes_with

SECONDS = 240


def wait_for(is_so: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.3)


def wait_for_end(stream: str) -> list[StepStatus]:
    """The steps, once none of them waits or runs."""
    wait_for(lambda: not any(step.is_live for step in chain_status(stream)[1]), f"the end of {stream}")
    return chain_status(stream)[1]


def job_of(stream: str, step: int) -> str:
    return read_chain(stream).jobs[step][-1]


def wait_until_it_trains(stream: str, step: int) -> None:
    """Until the step has come further than when this was called: it trains, and has a snapshot to go on from."""
    note = Path(read_chain(stream).progress_file(step))
    before = note.read_text() if note.exists() else ""

    def is_further() -> bool:
        return note.exists() and note.read_text() != before and json.loads(note.read_text())["done"] > 1

    wait_for(is_further, f"step {step} of {stream} to train")


def restarts(sandbox: Sandbox, job: str) -> int:
    """How often SLURM has begun the job again."""
    shown = sandbox.run("scontrol", "show", "job", "-o", job).stdout
    return int(shown.partition("Restarts=")[2].split()[0])


def wait_for_restart(sandbox: Sandbox, job: str, number: int) -> None:
    wait_for(lambda: restarts(sandbox, job) >= number, f"job {job} to be requeued for the {number}th time")


def limit_time(sandbox: Sandbox, job: str) -> None:
    """Let the job's time be up in one to two minutes, which are SLURM's unit."""
    shown = sandbox.run("scontrol", "show", "job", "-o", job).stdout
    hours, minutes = shown.partition("RunTime=")[2].split(":")[:2]
    sandbox.run("scontrol", "update", f"job={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")


def kill_daemon_of_node(sandbox: Sandbox, job: str) -> None:
    """`kill -9` of the process with which slurmd watches over one node's rank."""
    os.kill(psutil.Process(ranks_of(sandbox, job)[0]).ppid(), signal.SIGKILL)


def hold_ranks(sandbox: Sandbox, job: str) -> None:
    """Let the job's ranks stand still until SLURM wakes them: SIGCONT comes before its warning of the time limit."""
    for rank in ranks_of(sandbox, job):
        os.kill(rank, signal.SIGSTOP)


def ranks_of(sandbox: Sandbox, job: str) -> list[int]:
    """The processes of a job's two ranks; another sandbox may have a job of that number."""
    found = processes_with(f"SLURM_CONF={sandbox.conf}", f"SLURM_JOB_ID={job}", "SLURM_PROCID=")
    ranks = [pid for pid in found if psutil.Process(pid).cmdline()[1:4] == ["-u", "-m", "submitit.core._submit"]]
    assert len(ranks) == 2
    return ranks
