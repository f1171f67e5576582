"""Status of chains of jobs: each step's state, nodes, time, progress, accuracy and error; its logs; cancelling."""

import os
import time
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.errors import AvcilError, ConfigError, DataError, SchedulerError
from avcil_dist.streams.identity import has_identity
from avcil_dist.streams.snapshots import newest_snapshot
from avcil_dist.streams.stream import ARTIFACT_FOLDER, next_step
from avcil_dist.streams.summary import committed_steps, is_committed, load_metrics
from avcil_dist.tracking.session import close_run
from launch.cluster.chain_record import Chain, has_chain, read_chain, read_own_chain
from launch.cluster.live_jobs import wait_for_jobs
from launch.cluster.schedulers.base import JobState, scheduler_of
from launch.cluster.submission_lock import submission_lock
from launch.progress import ProgressRecord, duration

FOLLOW_SECONDS = 1.0
LIVE_SECONDS = 15.0  # between two calls of the scheduler while a log is followed
AGE_SECONDS = 60  # the age of a progress file above which it is shown
FOLDER_DEPTH = 3  # of streams below a folder, such as OUTPUT/NAME/STREAM


@dataclass(frozen=True)
class StepStatus:
    """Status of a step, from its job, its status files and its artifact.

    `state`: COMMITTED, NOT SUBMITTED, FAILED, ENDED (without a known reason), or the scheduler's word. `is_live`: its
    job waits or runs. `continues_from`: of a step that has ended early, the iteration of its newest snapshot.
    """

    step: int
    state: str
    job: str = ""
    nodes: str = ""
    reason: str = ""
    elapsed: str = ""
    limit: str = ""
    restarts: int = 0
    progress: str = ""
    seen_accuracy: float | None = None
    failure: str | None = None
    is_live: bool = False
    continues_from: int | None = None


@dataclass(frozen=True)
class ChainStatus:
    """Status of a stream's chain. `unknown`: why the scheduler has no states of jobs that have ended, else None."""

    stream: str
    chain: Chain
    steps: tuple[StepStatus, ...]
    unknown: str | None = None

    @property
    def current(self) -> StepStatus:
        """The first step that is not committed; the last one when all are."""
        return next((step for step in self.steps if step.state != "COMMITTED"), self.steps[-1])


def streams_below(folder: str, depth: int = FOLDER_DEPTH) -> list[str]:
    """Return the streams in a folder or below it, in order of name; a folder that is a stream is the only one.

    A stream has jobs, committed steps, or an identity, which the first start of its training writes.
    """
    if has_chain(folder) or has_identity(folder) or committed_steps(folder):
        return [folder]
    names = storage.list_folder(folder) if depth else []
    return [
        stream
        for name in names
        if not (name.startswith(".") or name == ARTIFACT_FOLDER)
        for stream in streams_below(storage.join(folder, name), depth - 1)
    ]


def chain_status(stream: str) -> ChainStatus:
    """Return the status of every step of a stream.

    Raises ConfigError where no jobs were submitted, ArtifactError for damaged metrics of a committed step.
    """
    return next(iter(chain_statuses({stream: read_chain(stream)}).values()))


def chain_statuses(chains: Mapping[str, Chain]) -> dict[str, ChainStatus]:
    """Return the status of streams, by stream; each scheduler is called once for all of them."""
    found: dict[str, ChainStatus] = {}
    for kind in sorted({chain.kind for chain in chains.values()}):
        of_kind = {stream: chain for stream, chain in chains.items() if chain.kind == kind}
        jobs, unknown = _jobs(kind, of_kind)
        for stream, chain in of_kind.items():
            found[stream] = ChainStatus(stream, chain, _steps(stream, chain, jobs[stream]), unknown)
    return {stream: found[stream] for stream in chains}


def _jobs(kind: str, chains: Mapping[str, Chain]) -> tuple[dict[str, dict[int, JobState]], str | None]:
    """Return the newest job of each step, by stream, and why those that ended are unknown; None where they are known.

    Raises SchedulerError without the scheduler, unless all steps are committed, as on a machine that results were
    copied to.
    """
    scheduler = scheduler_of(kind)
    none: dict[str, dict[int, JobState]] = {stream: {} for stream in chains}
    try:
        live = scheduler.live_jobs(chains)
    except SchedulerError as error:
        if any(next_step(stream, chain.num_steps) < chain.num_steps for stream, chain in chains.items()):
            raise
        return none, str(error)
    try:
        past = scheduler.past_jobs(chains)
    except SchedulerError as error:  # such as a cluster without accounting
        return live, str(error)
    return {stream: {**past[stream], **live[stream]} for stream in chains}, None


def cancel_chains(streams: Sequence[str]) -> tuple[dict[str, int], list[AvcilError]]:
    """End all jobs of streams that wait or run, and wait for their end. Steps and snapshots stay.

    Returns the number of jobs by stream, and the faults of other streams: no record of jobs, or one that is damaged or
    of another user; a submission under way; a scheduler that does not answer; jobs that have not ended by now.
    """
    ended: dict[str, int] = {}
    faults: list[AvcilError] = []
    with ExitStack() as locks:
        chains: dict[str, Chain] = {}
        for stream in streams:
            with _collected(faults):
                chains[stream] = _locked_chain(stream, locks)
        for kind in sorted({chain.kind for chain in chains.values()}):
            with _collected(faults):
                of_kind = {stream: chain for stream, chain in chains.items() if chain.kind == kind}
                scheduler = scheduler_of(kind)
                counts = scheduler.cancel(of_kind)
                ended |= counts
                if running := {stream: chain for stream, chain in of_kind.items() if counts[stream]}:
                    wait_for_jobs(scheduler, running, lambda *_: True)
        for stream, count in ended.items():
            if count:
                with _collected(faults):
                    close_run(chains[stream].config(), KeyboardInterrupt)
    return {stream: ended[stream] for stream in streams if stream in ended}, faults


def _locked_chain(stream: str, locks: ExitStack) -> Chain:
    """Return the record of a stream's jobs, of which no more are submitted while `locks` are held."""
    chain = read_own_chain(stream)
    if not Path(chain.folder).exists():  # where no job can run
        return chain
    locks.enter_context(submission_lock(stream, Path(chain.folder)))
    return read_own_chain(stream)


@contextmanager
def _collected(faults: list[AvcilError]) -> Iterator[None]:
    """Collect an error of the block, which does not stop what follows."""
    try:
        yield
    except AvcilError as error:
        faults.append(error)


def log_file(chain: Chain, step: int, rank: int) -> Path | None:
    """Return the log of a rank of the step's newest job, None where there is none yet."""
    job = chain.newest_job(step)
    path = chain.log_folder(step) / f"{job}_{rank}_log.out" if job else None
    return path if path is not None and path.exists() else None


def shown_step(stream: str) -> StepStatus:
    """Return the step whose log is shown by default: the one that runs, else the last that has a log, else the first.

    Raises ConfigError where no jobs were submitted.
    """
    status = chain_status(stream)
    if status.current.is_live:
        return status.current
    with_log = [step for step in status.steps if log_file(status.chain, step.step, 0)]
    return with_log[-1] if with_log else status.current


def log_text(stream: str, step: int, rank: int, *, follow: bool) -> Iterator[str]:
    """Yield the log of a step's rank piece by piece; with `follow` until its job is over.

    Raises ConfigError for an unknown step, or where there is no such log.
    """
    chain = read_chain(stream)
    if step not in range(chain.num_steps):
        raise ConfigError(f"{stream}: no step {step}; it has steps 0 to {chain.num_steps - 1}")
    log, is_over, next_look = None, False, 0.0
    while True:
        if time.monotonic() >= next_look:
            is_over = not (follow and chain_status(stream).steps[step].is_live)  # checked before the last read
            next_look = time.monotonic() + LIVE_SECONDS
        newest = log_file(read_chain(stream), step, rank)
        if log is not None and newest not in (None, log.path):  # the step has started again as another job
            yield log.read(is_whole=True)
            log = None
        if log is None and newest is not None:
            log = _GrowingLog(newest)
        if log is not None and (text := log.read(is_whole=is_over)):
            yield text
        if is_over:
            break
        time.sleep(FOLLOW_SECONDS)
    if log is None:
        has_started = log_file(read_chain(stream), step, 0) is not None
        why = "its job has fewer ranks" if has_started else "its job has not started"
        raise ConfigError(f"{stream}: step {step} has no log of rank {rank}; {why} (avcil status {stream})")


class _GrowingLog:
    """A log that is read piece by piece while it is written; from its beginning again once it is shorter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def read(self, *, is_whole: bool) -> str:
        """Return the text that is new; `is_whole`: also the beginning of a last character that is incomplete."""
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                self._offset = 0
                self._decoder.reset()
            file.seek(self._offset)
            piece = file.read()
        self._offset += len(piece)
        return self._decoder.decode(piece, is_whole)


def _steps(stream: str, chain: Chain, jobs: Mapping[int, JobState]) -> tuple[StepStatus, ...]:
    accuracies = _seen_accuracies(stream, chain.num_steps)
    steps: list[StepStatus] = []
    for step in range(chain.num_steps):
        accuracy = accuracies[step] if step < len(accuracies) else None
        status = _step_status(chain, step, jobs.get(step), accuracy, is_committed=is_committed(stream, step))
        if status.state == "CANCELLED":
            cause = _failed_step(steps)
            status = replace(status, reason="" if cause is None else f"step {cause} failed")
        if status.state in ("CANCELLED", "ENDED", "FAILED") and all(other.state == "COMMITTED" for other in steps):
            status = replace(status, continues_from=_continues_from(chain, step))
        steps.append(status)
    return tuple(steps)


def _step_status(
    chain: Chain, step: int, job: JobState | None, accuracy: float | None, *, is_committed: bool
) -> StepStatus:
    """Combine the job of a step (None: unknown to the scheduler), its status files and whether it is committed."""
    status = StepStatus(step, "COMMITTED", chain.newest_job(step) or "", seen_accuracy=accuracy)
    if job is not None:
        status = replace(
            status, job=job.id, nodes=job.nodes, elapsed=job.elapsed, limit=job.limit, restarts=job.restarts
        )
    if is_committed:
        return status
    failure = chain.failure(step)
    if job is None:
        without_job = "ENDED" if chain.newest_job(step) else "NOT SUBMITTED"
        return replace(status, state="FAILED" if failure else without_job, failure=failure)
    return replace(
        status,
        state="FAILED" if failure and not job.is_live else job.state,
        reason=job.reason,
        progress=_progress(chain, step),
        failure=failure,
        is_live=job.is_live,
    )


def _seen_accuracies(stream: str, num_steps: int) -> tuple[float, ...]:
    """Return the seen accuracy after each step up to the last committed one. Raises ArtifactError where damaged."""
    committed = next_step(stream, num_steps)
    return load_metrics(stream, committed - 1).seen_accuracy if committed else ()


def _progress(chain: Chain, step: int) -> str:
    try:
        progress = storage.read_json(chain.progress_file(step), ProgressRecord, "progress of a step")
    except DataError:
        return ""
    age = max(0, int(time.time() - progress.time))
    share = f"{progress.done / progress.total:.0%}  " if progress.total else ""  # none before a test without training
    if progress.phase == "testing":
        share = f"testing {share}"
    left = None if progress.remaining is None else max(0.0, progress.remaining - age)
    remaining = f"  {duration(left)} left" if left else ""
    return f"{share}{progress.values}".strip() + remaining + (f"  ({age} s ago)" if age > AGE_SECONDS else "")


def newest_iteration(config: Config, step: int) -> int | None:
    """Return the iteration of the step's newest snapshot; None without one, and where it cannot be read."""
    try:
        found = newest_snapshot(config, step)
    except (AvcilError, OSError):
        return None
    return found.iteration if found else None


def _continues_from(chain: Chain, step: int) -> int | None:
    """Return the iteration of the step's newest snapshot; None without one, or without the chain's settings."""
    try:
        config = chain.config()
    except (AvcilError, OSError):
        return None
    return newest_iteration(config, step)


def _failed_step(steps: Sequence[StepStatus]) -> int | None:
    """Return the first of these steps that has ended without being committed or cancelled, or None."""
    return next(
        (step.step for step in steps if step.state not in ("COMMITTED", "CANCELLED") and not step.is_live), None
    )
