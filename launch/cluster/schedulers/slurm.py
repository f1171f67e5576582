"""SLURM: sbatch submits the jobs, squeue and sacct list them, scancel ends them; submitit starts the ranks."""

import os
import secrets
import stat
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avcil_dist.config.schema import Config
from avcil_dist.errors import SchedulerError
from avcil_dist.streams.stream import stream_url
from avcil_dist.system.trusted_files import make_private_folder
from avcil_dist.world import World, world_from_environment
from launch.cluster.chain_record import Chain, write_chain
from launch.cluster.part_jobs import MERGE, PartJobs
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers import slurm_commands, slurm_parts
from launch.cluster.schedulers.base import JobStart, JobState, Lane
from launch.cluster.schedulers.slurm_commands import QueuedJob
from launch.cluster.schedulers.slurm_script import rank_command, sbatch_options, sbatch_parameters, sbatch_text
from launch.step_run import StepRun


@dataclass(frozen=True)
class SlurmScheduler:
    """The SLURM that the machine's client programs reach."""

    def check(self, cluster: ClusterConfig) -> None:
        """Accept all resources: sbatch refuses those that the cluster does not have."""

    def require(self) -> None:
        """Raise SchedulerError where sbatch is not installed."""
        slurm_commands.require_slurm()

    def lanes(self, cluster: ClusterConfig, num_streams: int) -> list[Lane]:
        """See `Scheduler.lanes`; SLURM chooses the GPUs."""
        return [Lane(cluster)] * max(1, min(cluster.max_parallel, num_streams))

    def submit(
        self, config: Config, cluster: ClusterConfig, chain: Chain, steps: Sequence[int], start: JobStart
    ) -> Chain:
        """See `Scheduler.submit`."""
        for step in steps:
            after = f"afterany:{':'.join(start.after)}" if start.after else None
            dependency = after if step == start.first_step else f"afterok:{chain.jobs[step - 1][-1]}"
            run = StepRun(config, step, chain.num_steps, start.run_id, chain.progress_file(step))
            chain = chain.with_job(step, _sbatch(run, cluster, chain, dependency))
            write_chain(stream_url(config), chain)  # at once, so that an interrupted submission can be continued
        return chain

    def live_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        """See `Scheduler.live_jobs`."""
        queue = slurm_commands.queued_jobs()
        found = {}
        for stream, chain in chains.items():
            jobs = _jobs_by_step(queue, chain)
            found[stream] = {step: _newest(chain, step, jobs[step]) for step in sorted(jobs)}
        return found

    def past_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        """See `Scheduler.past_jobs`. Raises SchedulerError on a cluster without accounting."""
        jobs = slurm_commands.past_jobs(ids[-1] for chain in chains.values() for ids in chain.jobs.values() if ids)
        return {
            stream: {step: jobs[ids[-1]] for step, ids in chain.jobs.items() if ids and ids[-1] in jobs}
            for stream, chain in chains.items()
        }

    def last_job(self, chain: Chain) -> str:
        """Return the id of the last step's job."""
        return chain.jobs[chain.num_steps - 1][-1]

    def cancel(self, chains: Mapping[str, Chain], first_step: int = 0) -> dict[str, int]:
        """See `Scheduler.cancel`."""
        queue = slurm_commands.queued_jobs()
        ids = {
            stream: [job.id for step, jobs in _jobs_by_step(queue, chain).items() if step >= first_step for job in jobs]
            for stream, chain in chains.items()
        }
        slurm_commands.cancel_jobs(id for of_stream in ids.values() for id in of_stream)
        return {stream: len(of_stream) for stream, of_stream in ids.items()}

    def script(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> str:
        """Return the script that sbatch receives."""
        dependency = f"afterok:{previous}" if previous else None
        return _script(chain, cluster, step, _parameters(chain, cluster, step, dependency), "PICKLED_RANKS")

    def options(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> dict[str, str]:
        """See `Scheduler.options`."""
        return sbatch_options(_parameters(chain, cluster, step, f"afterok:{previous}" if previous else None))

    def submit_parts(self, cluster: ClusterConfig, work: PartJobs) -> None:
        """See `Scheduler.submit_parts`: an array with a task for each part, and a job that depends on it."""
        options = slurm_parts.option_names(cluster, work)
        scripts = {name: Path(work.folder, f"{name}.sh") for name in ("parts", MERGE)}
        scripts["parts"].write_text(slurm_parts.array_text(cluster, work))
        array = slurm_commands.submit_script(scripts["parts"], options)
        scripts[MERGE].write_text(slurm_parts.merge_text(cluster, work, array))
        try:
            slurm_commands.submit_script(scripts[MERGE], options)
        except SchedulerError:
            slurm_commands.cancel_jobs([array])
            raise

    def live_parts(self, work: PartJobs) -> list[JobState]:
        """See `Scheduler.live_parts`. A job belongs to the build if its script lies in the build's folder."""
        return [state for state, script in slurm_commands.queued_jobs() if script.parent == Path(work.folder)]

    def parts_script(self, cluster: ClusterConfig, work: PartJobs) -> str:
        """See `Scheduler.parts_script`."""
        merge = slurm_parts.merge_text(cluster, work, "JOB_OF_PARTS")
        return f"### parts\n{slurm_parts.array_text(cluster, work)}\n### merge\n{merge}"

    def cancel_command(self, work: PartJobs) -> str:
        """See `Scheduler.cancel_command`."""
        ids = dict.fromkeys(state.id.partition("_")[0] for state in self.live_parts(work))
        return " ".join(["scancel", *sorted(ids, key=int, reverse=True)])

    def world(self, port: int) -> World:
        """Return the world that srun has set in the environment, or torchrun within the job."""
        return world_from_environment(os.environ)


SCHEDULER = SlurmScheduler()


def _sbatch(run: StepRun, cluster: ClusterConfig, chain: Chain, dependency: str | None) -> str:
    """Submit the job of one step; its id.

    All that the job needs is written before: it also runs when this process is killed right after sbatch.
    """
    from submitit.core.utils import DelayedSubmission

    from launch.cluster.rank_entry import RankEntry  # imports the training engine, which status does not need

    chain.clear_status(run.step)
    folder = make_private_folder(chain.log_folder(run.step))
    ranks = folder / f"{secrets.token_hex(4)}.pkl"
    DelayedSubmission(RankEntry(run, chain.folder, chain.kind)).dump(ranks)
    parameters = _parameters(chain, cluster, run.step, dependency)
    script = ranks.with_suffix(".sh")
    script.write_text(_script(chain, cluster, run.step, parameters, ranks.name))
    try:
        return slurm_commands.submit_script(script, sbatch_options(parameters))
    except SchedulerError as error:
        raise SchedulerError(f"step {run.step}: {error}") from None


def _script(chain: Chain, cluster: ClusterConfig, step: int, parameters: dict[str, Any], ranks: str) -> str:
    folder = str(chain.log_folder(step))
    command = rank_command(cluster.at(step), sys.executable, chain.folder, folder, ranks)
    return sbatch_text(parameters, folder=folder, command=command)


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


def _jobs_by_step(queue: Collection[QueuedJob], chain: Chain) -> dict[int, list[JobState]]:
    """Return the chain's jobs of the queue.

    A job belongs to a step if its id was recorded, or if its script lies in the step's folder: so is one found whose
    submission was interrupted before the record. Names count for nothing: users and their variables change them. A
    recorded id alone does not suffice: a new installation of SLURM counts from 1 again, and a record may be a
    stranger's. The same folder may have another path on the machine of the submission.
    """
    found: dict[int, list[JobState]] = {}
    for state, script in queue:
        for step in range(chain.num_steps):
            folder = chain.log_folder(step)
            is_recorded = state.id in chain.jobs.get(step, ()) and _is_copy(script, folder)
            if is_recorded or script.parent == folder:
                found.setdefault(step, []).append(state)
    return found


def _is_copy(script: Path, folder: Path) -> bool:
    """Whether a step's folder has a script of this name, which is random, and this user wrote it."""
    try:
        status = (folder / script.name).lstat()
    except OSError:
        return False
    return script.parent.name == folder.name and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


def _newest(chain: Chain, step: int, jobs: Sequence[JobState]) -> JobState:
    """Return the job that was recorded last, else the one that was submitted last."""
    recorded = [job for job in jobs if job.id == chain.newest_job(step)]
    return recorded[0] if recorded else max(jobs, key=lambda job: int(job.id))
