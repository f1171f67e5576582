"""SLURM: jobs are submitted with sbatch (through submitit), listed with squeue and sacct, ended with scancel."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from avcil_dist.config.schema import Config
from avcil_dist.errors import SchedulerError
from avcil_dist.streams.stream import stream_url
from avcil_dist.world import World, world_from_environment
from launch.cluster.chain_record import Chain, write_chain
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import JobStart, JobState
from launch.cluster.schedulers.slurm_script import sbatch_parameters, sbatch_text
from launch.step_run import StepRun

COMMAND_SECONDS = 60
MAX_ERROR_LENGTH = 300


@dataclass(frozen=True)
class SlurmScheduler:
    """The SLURM that the machine's client programs reach."""

    def check(self, cluster: ClusterConfig) -> None:
        """Accept all resources: sbatch refuses those that the cluster does not have."""

    def require(self) -> None:
        """Raise SchedulerError where sbatch is not installed."""
        if not shutil.which("sbatch"):
            raise SchedulerError(
                "no SLURM on this machine (sbatch is not installed); submit from a machine of the cluster, "
                "or run the chain on this machine with --cluster local"
            )

    def submit(
        self, config: Config, cluster: ClusterConfig, chain: Chain, steps: Sequence[int], start: JobStart
    ) -> Chain:
        """See `Scheduler.submit`."""
        for step in steps:
            after = f"afterany:{start.after}" if start.after else None
            dependency = after if step == start.first_step else f"afterok:{chain.jobs[step - 1][-1]}"
            reset_optimizer = start.reset_optimizer and step == start.first_step
            run = StepRun(config, step, chain.num_steps, start.run_id, reset_optimizer, chain.progress_file(step))
            chain = chain.with_job(step, _sbatch(run, cluster, chain, dependency))
            write_chain(stream_url(config), chain)  # at once, so that an interrupted submission can be continued
        return chain

    def live_jobs(self, stream: str, chain: Chain) -> dict[int, JobState]:
        """See `Scheduler.live_jobs`. A job that an interrupted submission did not record is found by its name."""
        jobs = _squeue(chain.job_prefix)
        by_id, by_name = {job.id: job for job in jobs}, {job.name: job for job in jobs}
        found = {}
        for step in range(chain.num_steps):
            newest = chain.newest_job(step)
            job = by_id.get(newest) if newest else None
            job = job or by_name.get(chain.job_name(step))
            if job is not None:
                found[step] = job
        return found

    def past_jobs(self, chain: Chain, steps: Iterable[int]) -> dict[int, JobState]:
        """See `Scheduler.past_jobs`; empty on a cluster without accounting."""
        newest = {step: job for step in steps if (job := chain.newest_job(step))}
        jobs = _sacct(newest.values())
        return {step: jobs[job] for step, job in newest.items() if job in jobs}

    def last_job(self, chain: Chain) -> str:
        """Return the id of the last step's job."""
        return chain.jobs[chain.num_steps - 1][-1]

    def cancel(self, chain: Chain, first_step: int = 0) -> int:
        """See `Scheduler.cancel`. Later jobs end first: none starts because the one before it has ended."""
        names = {chain.job_name(step) for step in range(first_step, chain.num_steps)}
        jobs = [job.id for job in _squeue(chain.job_prefix) if job.name in names]
        if jobs:
            _run(["scancel", *sorted(jobs, key=int, reverse=True)])
        return len(jobs)

    def script(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> str:
        """Return the script that sbatch receives."""
        parameters = _parameters(chain, cluster, step, f"afterok:{previous}" if previous else None)
        return sbatch_text(parameters, folder=str(chain.log_folder(step)), python=sys.executable)

    def world(self, port: int) -> World:
        """Return the world that srun has set in the environment, or torchrun within the job."""
        return world_from_environment(os.environ)


SCHEDULER = SlurmScheduler()


def _sbatch(run: StepRun, cluster: ClusterConfig, chain: Chain, dependency: str | None) -> str:
    """Submit the job of one step; its id."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    from launch.cluster.rank_entry import RankEntry  # imports the training engine, which status does not need

    chain.clear_status(run.step)
    executor = SlurmExecutor(chain.log_folder(run.step))
    executor.update_parameters(**_parameters(chain, cluster, run.step, dependency))
    try:
        return str(executor.submit(RankEntry(run, chain.folder, chain.kind)).job_id)
    except (FailedJobError, subprocess.SubprocessError) as error:
        text = " ".join(str(error).split())[:MAX_ERROR_LENGTH]
        raise SchedulerError(f"step {run.step}: sbatch refuses: {text}") from None


def _parameters(chain: Chain, cluster: ClusterConfig, step: int, dependency: str | None) -> dict[str, Any]:
    return sbatch_parameters(
        cluster,
        step,
        name=chain.job_name(step),
        code=chain.code,
        prefix=chain.step_prefix(step),
        python=sys.executable,
        dependency=dependency,
    )


def _squeue(prefix: str) -> list[JobState]:
    """The user's jobs that have not ended and whose names begin with `prefix`."""
    lines = _run(["squeue", "--me", "--noheader", "--format=%i|%j|%T|%N|%r"])
    fields = [line.split("|") for line in lines if line.count("|") == 4]
    return [
        JobState(id, name, state, nodes, reason, is_live=True)
        for id, name, state, nodes, reason in fields
        if name.startswith(prefix)
    ]


def _sacct(ids: Iterable[str]) -> dict[str, JobState]:
    """The jobs with these ids in the accounting, by id; none where there is no accounting."""
    wanted = ",".join(ids)
    if not wanted:
        return {}
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={wanted}"]
    try:
        lines = _run([*command, "--format=JobID,JobName%200,State,NodeList,ExitCode"])
    except SchedulerError:
        return {}
    jobs = {}
    for id, name, state, nodes, code in (line.split("|") for line in lines if line.count("|") == 4):
        nodes = "" if nodes == "None assigned" else nodes
        jobs[id] = JobState(id, name, state.split()[0], nodes, f"exit code {code.partition(':')[0]}", is_live=False)
    return jobs


def _run(command: Sequence[str]) -> list[str]:
    """Run a command of SLURM; its lines. Raises SchedulerError when it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except FileNotFoundError:
        SCHEDULER.require()
        raise SchedulerError(f"{command[0]}: not found; it belongs to SLURM's client programs") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]}: SLURM does not answer; try again") from None
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {' '.join((done.stderr or done.stdout).split())[:MAX_ERROR_LENGTH]}")
    return done.stdout.splitlines()
