"""A stream as a chain of jobs, one for each step, each after the one before it succeeded.

Submitting is idempotent: committed steps are skipped, jobs that wait or run are kept.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from avcil_dist import storage
from avcil_dist.config.compat import result_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import ConfigError, SchedulerError
from avcil_dist.streams.stream import next_step, stream_url
from avcil_dist.tracking.session import open_run
from avcil_dist.training.preflight import check_run
from avcil_dist.training.snapshot import snapshots_url
from launch.cluster.chain_record import Chain, has_chain, read_chain, write_chain
from launch.cluster.code_snapshot import snapshot_code, snapshot_place
from launch.cluster.rank_entry import RankEntry
from launch.cluster.resources import ClusterConfig, sbatch_parameters, sbatch_text
from launch.cluster.schedulers.slurm import cancel_jobs, live_jobs, require_slurm
from launch.cluster.supervisor import is_supervised, start_supervisor
from launch.local import ResumePolicy
from launch.step_run import StepRun

LOCK_SECONDS = 60
AS_IT_IS = ResumePolicy()  # nothing is thrown away


@dataclass(frozen=True)
class Submission:
    """What a submission did: `new` steps have new jobs, `kept` ones had theirs.

    `last` is what another chain waits for with `after`; None where nothing runs.
    """

    stream: str
    chain: Chain
    new: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    last: str | None = None


@dataclass(frozen=True)
class JobStart:
    """How the first new job begins.

    `run_id`: the stream run that the steps belong to; default: the stream's own, made at submission. `after`: it
    waits until what this names, the `last` of another submission, has ended, well or not. `begin`: what it does
    not go on from.
    """

    run_id: str | None = None
    after: str | None = None
    begin: ResumePolicy = AS_IT_IS


def submit_stream(
    config: Config,
    cluster: ClusterConfig,
    *,
    run_id: str | None = None,
    after: str | None = None,
    begin: ResumePolicy = AS_IT_IS,
) -> Submission:
    """Submit the jobs of all steps that are neither committed nor waiting nor running; see `JobStart`.

    Raises ConfigError or DataError for what would fail later, SchedulerError where SLURM is not there or refuses.
    """
    if cluster.kind == "slurm":
        require_slurm()
    chain = plan_chain(config, cluster, restart=begin.restart)
    if begin != AS_IT_IS:
        _throw_away(config, chain, begin)
    with _one_at_a_time(Path(chain.folder)):
        submit = _submit_local if cluster.kind == "local" else _submit_slurm
        return submit(config, cluster, chain, JobStart(run_id, after, begin))


def plan_chain(config: Config, cluster: ClusterConfig, *, restart: bool = False) -> Chain:
    """Hold the stream against the data and every step's number of ranks; the chain, before anything is submitted."""
    stream = stream_url(config)
    sizes = sorted({cluster.at(step).world_size for step in (0, *cluster.steps)})
    [num_steps] = {check_run(config, size, restart=restart).num_steps for size in sizes}
    jobs = read_chain(stream).jobs if has_chain(stream) else {}
    place = storage.local_path(stream)
    if cluster.folder is not None:
        folder = Path(cluster.folder).expanduser() / config.stream_name
    elif place is not None:
        folder = Path(place) / "jobs"
    else:
        raise ConfigError(f"{stream} is not on a disk: give `folder` in the cluster file, on one that all nodes share")
    # Streams of the same name in other folders are other streams.
    identity = storage.sha256(str(Path(place).absolute() if place else stream).encode())[:6]
    return Chain(cluster.kind, f"{config.stream_name}-{identity}", str(folder.absolute()), num_steps, jobs=jobs)


def script_texts(config: Config, cluster: ClusterConfig) -> dict[int, str]:
    """The sbatch script of each step that is not committed; the ids that dependencies name are not known yet."""
    chain = plan_chain(config, cluster)
    code = snapshot_place(Path(chain.folder))
    chain = replace(chain, code=str(code) if code else None)
    first = next_step(stream_url(config), chain.num_steps)
    return {
        step: sbatch_text(
            _parameters(chain, cluster, step, f"afterok:JOB_OF_STEP_{step - 1}" if step > first else None),
            folder=str(chain.logs(step)),
            python=sys.executable,
        )
        for step in range(first, chain.num_steps)
    }


def _submit_slurm(config: Config, cluster: ClusterConfig, chain: Chain, start: JobStart) -> Submission:
    stream = stream_url(config)
    first = next_step(stream, chain.num_steps)
    live = _live_steps(chain, first)
    todo = [step for step in range(first, chain.num_steps) if step not in live]
    kept = tuple(live)
    if live:
        _check_same(config, chain)
    if todo:
        chain = _freeze(config, cluster, chain)
        run_id = start.run_id or open_run(config)
    for step in todo:
        previous = f"afterany:{start.after}" if start.after else None
        job = StepRun(
            config, step, chain.num_steps, run_id, start.begin.reset_optimizer and step == first, chain.note(step)
        )
        live[step] = _submit_step(job, cluster, chain, f"afterok:{live[step - 1]}" if step - 1 in live else previous)
        chain = chain.with_job(step, live[step])
        write_chain(stream, chain)  # at once: a submission that is cut off here is known to the next
    return Submission(stream, chain, tuple(todo), kept, live[max(live)] if live else None)


def _submit_step(job: StepRun, cluster: ClusterConfig, chain: Chain, dependency: str | None) -> str:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    chain.clear_marks(job.step)
    executor = SlurmExecutor(chain.logs(job.step))
    executor.update_parameters(**_parameters(chain, cluster, job.step, dependency))
    try:
        return str(executor.submit(RankEntry(job, chain.folder)).job_id)
    except (FailedJobError, subprocess.SubprocessError) as error:
        raise SchedulerError(f"step {job.step}: sbatch refuses: {' '.join(str(error).split())[:300]}") from None


def _submit_local(config: Config, cluster: ClusterConfig, chain: Chain, start: JobStart) -> Submission:
    """Start the process that runs the chain's jobs one after the other, unless it runs."""
    stream = stream_url(config)
    todo = tuple(range(next_step(stream, chain.num_steps), chain.num_steps))
    if is_supervised(chain.folder):
        _check_same(config, chain)
        return Submission(stream, chain, kept=todo, last=chain.folder)
    if not todo:
        return Submission(stream, chain)
    chain = _freeze(config, cluster, chain)
    for step in todo:
        chain.clear_marks(step)
    write_chain(stream, chain)
    start_supervisor(chain, stream, start.run_id or open_run(config), start.after, start.begin.reset_optimizer)
    return Submission(stream, chain, new=todo, last=chain.folder)


def _throw_away(config: Config, chain: Chain, begin: ResumePolicy) -> None:
    """Remove what the stream does not go on from. Raises ConfigError while its jobs wait or run."""
    stream = stream_url(config)
    is_live = is_supervised(chain.folder) if chain.kind == "local" else bool(live_jobs(chain.job_prefix))
    if is_live:
        raise ConfigError(f"{stream}: its jobs wait or run; end them first: avcil cancel {stream}")
    first = 0 if begin.restart else next_step(stream, chain.num_steps)
    if begin.restart:
        storage.remove_tree(stream)
    if begin.restart or begin.restart_step:
        storage.remove_tree(snapshots_url(config, first))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """One submission of a stream at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "submit.lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise SchedulerError(f"{folder}: another submission of this stream is under way; try again") from None


def _freeze(config: Config, cluster: ClusterConfig, chain: Chain) -> Chain:
    """Keep code and settings of this moment."""
    code = snapshot_code(Path(chain.folder))
    chain.freeze(config, cluster)
    return replace(chain, code=str(code) if code else None)


def _check_same(config: Config, chain: Chain) -> None:
    """Raises ConfigError when the jobs that wait or run were submitted with other settings."""
    for change in result_changes(flatten(chain.config()), flatten(config)):
        stream = stream_url(config)
        raise ConfigError(
            f"{stream}: its jobs were submitted with {change.key}={change.before}, not {change.after}; "
            f"end them first: avcil cancel {stream}"
        )


def _live_steps(chain: Chain, first: int) -> dict[int, str]:
    """The steps from `first` on that have a job which waits or runs; jobs that wait for one that is gone are ended."""
    by_name = {job.name: job.id for job in live_jobs(chain.job_prefix)}
    live = {step: by_name[name] for step in range(first, chain.num_steps) if (name := chain.job_name(step)) in by_name}
    if live and first not in live:
        cancel_jobs(list(live.values()))
        return {}
    return live


def _parameters(chain: Chain, cluster: ClusterConfig, step: int, dependency: str | None) -> dict[str, Any]:
    return sbatch_parameters(
        cluster,
        step,
        name=chain.job_name(step),
        code=chain.code,
        mark=chain.mark(step),
        python=sys.executable,
        dependency=dependency,
    )
