"""Commands of SLURM's client programs: sbatch, squeue, sacct, scancel. Each has the environment made for it.

Every command ends within COMMAND_SECONDS; one that fails or does not answer is a SchedulerError of one line.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from avcil_dist.errors import SchedulerError
from launch.cluster.schedulers.base import JobState
from launch.environments import sbatch_environment, slurm_client_environment

COMMAND_SECONDS = 60
MAX_ERROR_LENGTH = 300
QUEUE_FIELDS = ("JobArrayID", "State", "NodeList", "TimeUsed", "TimeLimit", "RestartCnt", "Reason", "Command")
ACCOUNT_FIELDS = ("JobID", "State", "NodeList", "Elapsed", "Timelimit", "ExitCode")
EMPTY = ("None", "None assigned", "(null)", "")  # words of SLURM for a field without a value


class QueuedJob(NamedTuple):
    """A job that has not ended, and the script that was given to sbatch."""

    state: JobState
    script: Path


def require_slurm() -> None:
    """Raise SchedulerError where sbatch is not installed."""
    if not shutil.which("sbatch"):
        raise SchedulerError(
            "no SLURM on this machine (sbatch is not installed); submit from a machine of the cluster, "
            "or run the chain on this machine with --cluster local"
        )


def submit_script(script: Path, options: Collection[str]) -> str:
    """Submit a script with sbatch; `options` are the names of the options that it sets. Returns the job's id."""
    lines = _run(["sbatch", "--parsable", str(script)], sbatch_environment(os.environ, options))
    ids = [match[1] for line in lines if (match := re.fullmatch(r"(\d+)(;\S*)?", line.strip()))]
    if not ids:
        raise SchedulerError(f"sbatch: no job id in its output: {' '.join(lines)[:MAX_ERROR_LENGTH]!r}")
    return ids[-1]


def queued_jobs() -> list[QueuedJob]:
    """Return the user's jobs that have not ended, of all partitions."""
    fields = ",".join(f"{field}:|" for field in QUEUE_FIELDS)
    lines = _run(["squeue", "--me", "--all", "--noheader", f"--Format={fields}"], _client())
    found = []
    for line in lines:
        values = line.split("|", len(QUEUE_FIELDS) - 1)
        if len(values) == len(QUEUE_FIELDS):
            id, state, nodes, elapsed, limit, restarts, reason, script = values
            found.append(
                QueuedJob(
                    JobState(
                        id,
                        state,
                        _value(nodes),
                        _value(reason),
                        is_live=True,
                        elapsed=elapsed if nodes else "",
                        limit=limit,
                        restarts=int(restarts) if restarts.isdecimal() else 0,
                        is_ending=state == "COMPLETING",
                    ),
                    Path(script.rpartition("|")[0]),
                )
            )
    return found


def past_jobs(ids: Iterable[str]) -> dict[str, JobState]:
    """Return the jobs with these ids in the accounting, by id. Raises SchedulerError where there is no accounting."""
    wanted = ",".join(ids)
    if not wanted:
        return {}
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={wanted}"]
    jobs = {}
    for line in _run([*command, f"--format={','.join(ACCOUNT_FIELDS)}"], _client()):
        values = line.split("|")
        if len(values) == len(ACCOUNT_FIELDS) and values[1]:
            id, state, nodes, elapsed, limit, code = values
            reason = f"exit code {code.partition(':')[0]}"
            word = state.split()[0]  # CANCELLED by 1000
            jobs[id] = JobState(
                id, word, _value(nodes), reason, is_live=False, elapsed=_as_queued(elapsed), limit=_as_queued(limit)
            )
    return jobs


def _as_queued(time: str) -> str:
    """Return a time of sacct, 00:01:00, in the form of squeue, 1:00."""
    return re.sub("^(00:)?0?(?=[0-9])", "", time)


def cancel_jobs(ids: Iterable[str]) -> None:
    """End jobs, the newest first: none starts because the one before it has ended."""
    newest_first = sorted(ids, key=int, reverse=True)
    if newest_first:
        _run(["scancel", *newest_first], _client())


def _client() -> dict[str, str]:
    return slurm_client_environment(os.environ)


def _value(text: str) -> str:
    return "" if text in EMPTY else text


def _run(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Run a command of SLURM; its lines. Raises SchedulerError when it fails or does not answer."""
    name = command[0]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            env=environment,
            close_fds=False,  # the lock of the submission is inherited; Python's other files are not
        )
    except FileNotFoundError:
        require_slurm()
        raise SchedulerError(f"{name}: not found; it belongs to SLURM's client programs") from None
    except OSError as error:
        raise SchedulerError(f"{name}: cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{name}: SLURM does not answer within {COMMAND_SECONDS} s; try again") from None
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split())[:MAX_ERROR_LENGTH]
        raise SchedulerError(f"{name}: {text or f'exit code {done.returncode}'}")
    return done.stdout.splitlines()
