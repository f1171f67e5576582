"""What SLURM says of jobs, and what it is told: squeue, sacct, scancel."""

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from avcil_dist.errors import SchedulerError

SECONDS = 60


@dataclass(frozen=True)
class JobState:
    """A job as SLURM sees it; `is_live`: it waits, runs or is about to run again."""

    id: str
    name: str
    state: str
    nodes: str
    reason: str
    is_live: bool


def require_slurm() -> None:
    """Raises SchedulerError where there is no SLURM."""
    if not shutil.which("sbatch"):
        raise SchedulerError(
            "no SLURM here (there is no sbatch); submit from a machine of the cluster, "
            "or run the chain on this machine with --cluster local"
        )


def live_jobs(prefix: str) -> list[JobState]:
    """The user's jobs that are not over and whose name begins so. Raises SchedulerError when SLURM does not answer."""
    lines = _ask(["squeue", "--me", "--noheader", "--format=%i|%j|%T|%N|%r"])
    fields = [line.split("|") for line in lines if line.count("|") == 4]
    return [
        JobState(id, name, state, nodes, reason, is_live=True)
        for id, name, state, nodes, reason in fields
        if name.startswith(prefix)
    ]


def past_jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """What the accounting holds of these jobs; nothing where there is no accounting."""
    wanted = ",".join(ids)
    if not wanted:
        return {}
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={wanted}"]
    try:
        lines = _ask([*command, "--format=JobID,JobName%200,State,NodeList,ExitCode"])
    except SchedulerError:
        return {}
    found = {}
    for id, name, state, nodes, code in (line.split("|") for line in lines if line.count("|") == 4):
        nodes = "" if nodes == "None assigned" else nodes
        found[id] = JobState(id, name, state.split()[0], nodes, f"exit code {code.partition(':')[0]}", is_live=False)
    return found


def cancel_jobs(ids: Sequence[str]) -> None:
    """End jobs for good."""
    if ids:
        _ask(["scancel", *ids])


def _ask(command: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        require_slurm()
        raise SchedulerError(f"{command[0]}: not found; it belongs to SLURM's client programs") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]}: SLURM does not answer; try again") from None
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split())[:300]}")
    return done.stdout.splitlines()
