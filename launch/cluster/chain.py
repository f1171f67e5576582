"""Submission of a stream as a chain of jobs: one job for each step, each after the one before it succeeded.

Submitting is idempotent: committed steps are skipped, and jobs that wait or run are kept. One that ends is waited for.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from avcil_dist import storage
from avcil_dist.config.compat import setting_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.data.subset import load_data
from avcil_dist.errors import ConfigError
from avcil_dist.streams.snapshots import check_snapshot_fits, is_of_step, newest_snapshot, snapshot_identity
from avcil_dist.streams.stream import next_step, sole_runner, stream_url
from avcil_dist.streams.summary import is_committed
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.session import check_tracking, open_run
from avcil_dist.tracking.uris import is_sqlite
from avcil_dist.training.preflight import preflight
from launch.cluster.chain_record import Chain, has_chain, read_chain
from launch.cluster.code_snapshot import snapshot_code, snapshot_folder
from launch.cluster.live_jobs import require_no_jobs, wait_for_jobs
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import JobStart, JobState, Lane, scheduler_of
from launch.cluster.submission_lock import submission_lock
from launch.resume_policy import KEEP_ALL, ResumePolicy, discard_state
from launch.step_run import StepRun

FOLDER_MARKS = {
    "%": "in the paths of logs SLURM replaces it by numbers of the job",
    "\\": "in the paths of logs SLURM takes it for a mark of its own",
    ":": "it separates the folders of PYTHONPATH",
}


@dataclass(frozen=True)
class Submission:
    """Result of a submission: `new` steps have new jobs, `kept` steps already had theirs.

    `last` is what `after` of another chain's submission waits for; None where nothing runs.
    """

    stream: str
    chain: Chain
    new: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    last: str | None = None


def submit_stream(
    config: Config,
    cluster: ClusterConfig,
    *,
    run_id: str | None = None,
    after: Sequence[str] = (),
    policy: ResumePolicy = KEEP_ALL,
    lane: Lane | None = None,
) -> Submission:
    """Submit the jobs of all steps that are neither committed nor waiting nor running.

    `run_id`: the MLflow run of the stream; default: its own, opened at submission. `after`: the `last` of other
    submissions; the first job waits until they have ended, successfully or not. `policy`: what to discard before.
    `lane`: of the cluster; default: the only one of a single stream.

    Of a stream whose steps are all committed, this process publishes what a killed job did not.

    Raises ConfigError or DataError for what would fail later, SchedulerError where the scheduler is missing or refuses.
    """
    scheduler = scheduler_of(cluster.kind)
    scheduler.require()
    lane = lane or scheduler.lanes(cluster, 1)[0]
    cluster = lane.cluster
    stream, chain = stream_url(config), plan_chain(config, cluster, restart=policy.restart)
    with submission_lock(stream, Path(chain.folder)):
        chain = _with_recorded_jobs(chain, stream)
        jobs = wait_for_jobs(scheduler, {stream: chain}, _is_awaited)[stream]
        if policy != KEEP_ALL:
            require_no_jobs(stream, jobs)
            with sole_runner(stream):
                discard_state(config, policy, chain.num_steps)
            chain = _with_recorded_jobs(chain, stream)
        first = next_step(stream, chain.num_steps)
        if first == chain.num_steps:
            StepRun(config, first - 1, first, run_id).publish_unpublished()
        live = {step: job for step, job in jobs.items() if step >= first}
        if live and first not in live:  # the others wait for a job that is gone
            scheduler.cancel({stream: chain}, first)
            live = {}
        if live:
            _check_same(config, cluster, chain)
        for step, job in live.items():
            if job.id and job.id not in chain.jobs.get(step, ()):  # its submission was interrupted before the record
                chain = chain.with_job(step, job.id)
        new = tuple(step for step in range(first, chain.num_steps) if step not in live)
        if new:
            if new[0] == first:
                _check_snapshot(config, first)
            chain = _freeze(config, cluster, chain)
            run_id = run_id or open_run(config, is_elsewhere=cluster.is_elsewhere)
            start = JobStart(run_id, first, tuple(after), lane.gpus)
            chain = scheduler.submit(config, cluster, chain, new, start)
        return Submission(stream, chain, new, tuple(live), scheduler.last_job(chain) if new or live else None)


def kept_streams(configs: Iterable[Config], cluster: ClusterConfig) -> set[str]:
    """Return the streams whose first step that is not committed waits or runs: their submission keeps the jobs."""
    recorded = [stream for stream in map(stream_url, configs) if has_chain(stream)]
    chains = {stream: chain for stream in recorded if (chain := read_chain(stream)).kind == cluster.kind}
    if not chains:
        return set()
    live = scheduler_of(cluster.kind).live_jobs(chains)
    return {stream for stream, chain in chains.items() if next_step(stream, chain.num_steps) in live[stream]}


def plan_chain(config: Config, cluster: ClusterConfig, *, restart: bool = False) -> Chain:
    """Check the stream against the data and every step's number of ranks; return the chain, nothing is submitted."""
    scheduler_of(cluster.kind).check(cluster)
    stream = stream_url(config)
    sizes = sorted({cluster.at(step).world_size for step in (0, *cluster.steps)})
    num_steps = preflight(config, sizes, restart=restart).num_steps
    check_tracking(config)
    path = storage.local_path(stream)
    if cluster.folder is not None:
        folder = Path(cluster.folder) / config.stream_name
    elif path is not None:
        folder = Path(path) / "jobs"
    else:
        raise ConfigError(f"{stream} is not on a disk: set `folder` in the cluster file, on a disk of all nodes")
    check_jobs_folder(folder)
    # Streams of the same name in other folders are other streams.
    identity = storage.sha256(str(Path(path).absolute() if path else stream).encode())[:6]
    return Chain(cluster.kind, f"{config.stream_name}-{identity}", str(folder.absolute()), num_steps)


def check_jobs_folder(folder: Path) -> None:
    """Raise ConfigError for a path that SLURM, submitit or PYTHONPATH takes for something else."""
    for mark, reason in FOLDER_MARKS.items():
        if mark in str(folder.absolute()):
            raise ConfigError(
                f"{folder}: {mark!r} in the path: {reason}; choose another output=, or cluster.folder= for the files "
                "of the jobs"
            )


def kept_events_note(config: Config, cluster: ClusterConfig, streams: str) -> str | None:
    """Return a line for jobs that only keep their tracking events, since several machines must not write to sqlite.

    `streams`: what `avcil sync` is to be called with. None where jobs send their events themselves.
    """
    uri = check_tracking(config)
    if not (cluster.is_elsewhere and is_sqlite(uri)):
        return None
    return (
        f"{redacted(uri)}: an SQLite file is not written from several machines; the jobs keep their tracking events: "
        f"send them from here with avcil sync {shlex.quote(streams)}, or give tracking.uri a server"
    )


def dry_run_text(config: Config, cluster: ClusterConfig) -> str:
    """Return the job script of the first step that is not committed, and a table of what differs by step.

    Ids of jobs are placeholders.
    """
    chain = plan_chain(config, cluster)
    code = snapshot_folder(Path(chain.folder))
    chain = replace(chain, code=str(code) if code else None)
    steps = range(next_step(stream_url(config), chain.num_steps), chain.num_steps)
    if not steps:
        return f"{stream_url(config)}: all steps are committed, nothing would be submitted"
    scheduler = scheduler_of(cluster.kind)
    previous = {step: f"JOB_OF_STEP_{step - 1}" if step > steps[0] else None for step in steps}
    script = scheduler.script(chain, cluster, steps[0], previous[steps[0]])
    options = {step: scheduler.options(chain, cluster, step, previous[step]) for step in steps}
    return f"{script}\n\n{_differences(options)}"


def _differences(options: Mapping[int, Mapping[str, str]]) -> str:
    """Return a table of the options that are not the same in all steps, a row for each step."""
    names = sorted({name for of_step in options.values() for name in of_step})
    differing = [name for name in names if len({of_step.get(name) for of_step in options.values()}) > 1]
    rows = [["step", *differing]]
    rows += [[str(step), *(of_step.get(name, "-") or "yes" for name in differing)] for step, of_step in options.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["### what differs by step, beside the step's number in paths", *lines])


def _is_awaited(stream: str, step: int, job: JobState) -> bool:
    """Whether a job ends whose step is not committed: jobs that start after its success may never do so."""
    return job.is_ending and not is_committed(stream, step)


def _with_recorded_jobs(chain: Chain, stream: str) -> Chain:
    return replace(chain, jobs=read_chain(stream).jobs if has_chain(stream) else {})


def _freeze(config: Config, cluster: ClusterConfig, chain: Chain) -> Chain:
    """Copy code and settings as they are now into the chain's folder."""
    code = snapshot_code(Path(chain.folder))
    chain.freeze(config, cluster)
    return replace(chain, code=str(code) if code else None)


def _check_same(config: Config, cluster: ClusterConfig, chain: Chain) -> None:
    """Raise ConfigError when the jobs that wait or run were submitted with other settings, of stream or cluster."""
    submitted = flatten(chain.config()) | _of_cluster(chain.cluster())
    for change in setting_changes(submitted, flatten(config) | _of_cluster(cluster)):
        stream = stream_url(config)
        raise ConfigError(
            f"{stream}: its jobs were submitted with {change.key}={change.before}, not {change.after}; "
            f"end them first: avcil cancel {shlex.quote(stream)}"
        )


def _of_cluster(cluster: ClusterConfig) -> dict[str, Any]:
    """Return the settings of a cluster file that its jobs depend on, by their names on the command line."""
    return {f"cluster.{key}": value for key, value in cluster.model_dump(exclude={"max_parallel"}).items()}


def _check_snapshot(config: Config, step: int) -> None:
    """Raise ConfigError when the job of a step could not continue from its newest snapshot."""
    found = newest_snapshot(config, step)
    if found is None:
        return
    identity = snapshot_identity(config, step, load_data(config.data).content_hash)
    if is_of_step(found.commit, identity):
        check_snapshot_fits(found.folder, found.commit, config, step)
