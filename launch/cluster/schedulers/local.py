"""Chain of jobs on this machine, without a scheduler's daemon: a supervisor process runs one job after the other.

The supervisor (`local_supervisor.py`) outlives the shell and holds a file lock for as long as it lives.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.errors import ConfigError, RankError, SchedulerError
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import is_committed
from avcil_dist.world import LOOPBACK, World
from launch.cluster.chain_record import Chain, write_chain
from launch.cluster.guarded_setup import guarded_setup
from launch.cluster.part_jobs import PartJobs
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import JobStart, JobState, Lane
from launch.environments import without_launcher
from launch.progress import duration

LOCK, PID, LOG = "supervisor.lock", "supervisor.pid", "supervisor.log"
POLL_SECONDS, LOCK_SECONDS, START_SECONDS, STOP_SECONDS = 0.2, 10.0, 60.0, 120.0


@dataclass(frozen=True)
class LocalScheduler:
    """The local machine; a chain is identified by its folder."""

    def check(self, cluster: ClusterConfig) -> None:
        """Raise ConfigError for more than one node, and for a container."""
        if cluster.container or cluster.python:
            setting = "container" if cluster.container else "python"
            raise ConfigError(f"cluster file: {setting}: kind: local runs jobs with this Python; use kind: slurm")
        for step in sorted({0, *cluster.steps}):
            nodes = cluster.at(step).nodes
            if nodes > 1:
                raise ConfigError(f"cluster file: nodes={nodes}: kind: local is this one machine; set tasks_per_node")

    def require(self) -> None:
        """Accept every machine."""

    def lanes(self, cluster: ClusterConfig, num_streams: int) -> list[Lane]:
        """See `Scheduler.lanes`; the lanes share out the GPUs that are visible here."""
        from avcil_dist.training.device import gpu_facts  # imports torch, which status does not need
        from launch.cluster.lanes import machine_lanes, visible_gpus

        return machine_lanes(cluster, visible_gpus(gpu_facts().count, os.environ), num_streams)

    def submit(
        self, config: Config, cluster: ClusterConfig, chain: Chain, steps: Sequence[int], start: JobStart
    ) -> Chain:
        """See `Scheduler.submit`. The supervisor records each job as it starts."""
        for step in steps:
            chain.clear_status(step)
        write_chain(stream_url(config), chain)
        module = "launch.cluster.schedulers.local_supervisor"
        arguments = [stream_url(config), start.run_id, *start.after]
        start_supervisor(chain.folder, chain.code, cluster, [module, *arguments], start.gpus)
        return chain

    def live_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        """See `Scheduler.live_jobs`. The first step that is not committed runs while the supervisor does."""
        return {stream: _live_jobs(stream, chain) for stream, chain in chains.items()}

    def past_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        """Return nothing: there is no accounting."""
        return {stream: {} for stream in chains}

    def last_job(self, chain: Chain) -> str:
        """Return the chain's folder, in which its lock is."""
        return chain.folder

    def cancel(self, chains: Mapping[str, Chain], first_step: int = 0) -> dict[str, int]:
        """End the supervisors, and with them all steps; a step that runs writes a snapshot. Returns 1 for each.

        All receive the signal first: a chain that waits for another one must not start when that ends.
        """
        running = {stream: chain for stream, chain in chains.items() if is_supervised(chain.folder)}
        deadline = time.monotonic() + STOP_SECONDS
        for chain in running.values():
            while is_supervised(chain.folder) and not Path(chain.folder, PID).exists():  # it has just started
                time.sleep(POLL_SECONDS)
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                os.kill(int(Path(chain.folder, PID).read_text()), signal.SIGTERM)
        for chain in running.values():
            while is_supervised(chain.folder):
                if time.monotonic() > deadline:
                    raise SchedulerError(f"the chain does not end; see {Path(chain.folder, LOG)}")
                time.sleep(POLL_SECONDS)
        return {stream: int(stream in running) for stream in chains}

    def script(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> str:
        """Raise ConfigError: a local chain has no job script."""
        raise ConfigError("--dry-run prints job scripts, and a chain with kind: local has none")

    def options(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> dict[str, str]:
        """Return nothing: there is no job script."""
        return {}

    def submit_parts(self, cluster: ClusterConfig, work: PartJobs) -> None:
        """See `Scheduler.submit_parts`. One process runs the parts one after the other."""
        start_supervisor(work.folder, work.code, cluster, ["launch.cluster.schedulers.local_parts", work.folder])

    def live_parts(self, work: PartJobs) -> list[JobState]:
        """See `Scheduler.live_parts`: one job that runs all parts."""
        state = JobState(id="", state="RUNNING", nodes="this machine", reason="", is_live=True)
        return [state] if is_supervised(work.folder) else []

    def parts_script(self, cluster: ClusterConfig, work: PartJobs) -> str:
        """Raise ConfigError: there is no job script."""
        raise ConfigError("--dry-run prints job scripts, and a cluster with kind: local has none")

    def cancel_command(self, work: PartJobs) -> str:
        """See `Scheduler.cancel_command`."""
        return f"kill {Path(work.folder, PID).read_text()}"

    def world(self, port: int) -> World:
        """Return the world that submitit's local executor has set in the environment.

        Raises RankError in a rank whose controller, which has the job's id, ended before the rank could end with it.
        """
        rank, size = int(os.environ["SUBMITIT_LOCAL_GLOBALID"]), int(os.environ["SUBMITIT_LOCAL_NTASKS"])
        start = os.environ["SUBMITIT_LOCAL_JOB_ID"]
        if os.getppid() != int(start):
            raise RankError("the supervisor of this rank has ended")
        return World(rank, size, rank, size, LOOPBACK, port, launcher="local", start_id=start)


SCHEDULER = LocalScheduler()


def _live_jobs(stream: str, chain: Chain) -> dict[int, JobState]:
    if not is_supervised(chain.folder):
        return {}
    waiting = [step for step in range(chain.num_steps) if not is_committed(stream, step)]
    limit = duration(3600 * chain.cluster().at(waiting[0]).hours) if waiting else ""
    return {
        step: JobState(
            id=chain.newest_job(step) or "",
            state="RUNNING" if step == waiting[0] else "WAITING",
            nodes="this machine" if step == waiting[0] else "",
            reason="",
            is_live=True,
            elapsed=_elapsed(chain, step) if step == waiting[0] else "",
            limit=limit if step == waiting[0] else "",
            restarts=max(0, len(chain.jobs.get(step, ())) - 1),
        )
        for step in waiting
    }


def _elapsed(chain: Chain, step: int) -> str:
    """Return the time since the step's newest job was started; empty before that."""
    started = chain.log_folder(step) / f"{chain.newest_job(step)}_submitted.pkl"
    return duration(time.time() - started.stat().st_mtime) if started.exists() else ""


def is_supervised(folder: str) -> bool:
    """Whether a supervisor runs the chain of this folder."""
    try:
        with Path(folder, LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that a probe does not see another one
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def supervising(folder: str) -> Iterator[None]:
    """Hold the lock of a folder during the block, as its supervisor; the folder has the id of this process then.

    Raises Timeout where there is a supervisor already. A probe, which holds the lock for an instant, is none.
    """
    with FileLock(Path(folder, LOCK), timeout=LOCK_SECONDS):
        storage.write_bytes(f"{folder}/{PID}", str(os.getpid()).encode())  # whole at once
        yield


def start_supervisor(
    folder: str, code: str | None, cluster: ClusterConfig, words: Sequence[str], gpus: Sequence[str] = ()
) -> None:
    """Start the module and arguments `words`, which hold the folder's lock, in a session of their own.

    `gpus`: those that it can use; none: all. Raises SchedulerError when the process ends at once.
    """
    path = os.pathsep.join(part for part in (code, os.environ.get("PYTHONPATH")) if part)
    command = shlex.join([sys.executable, "-u", "-m", *words])
    script = "\n".join([*guarded_setup(cluster.setup, []), f"exec {command}"])
    Path(folder, PID).unlink(missing_ok=True)  # of an earlier supervisor
    log_file = Path(folder, LOG)
    with storage.writing(log_file, storage.REFUSED), log_file.open("ab") as log:
        process = subprocess.Popen(
            ["/bin/bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=without_launcher(os.environ)
            | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
            | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
        )
    deadline = time.monotonic() + START_SECONDS
    while not is_supervised(folder) and not Path(folder, PID).exists():  # a short one may have ended by now
        if process.poll() is not None or time.monotonic() > deadline:
            raise SchedulerError(f"the jobs did not start; see {log_file}")
        time.sleep(POLL_SECONDS)
