"""Status of a chain of jobs: each step's state, nodes, progress, accuracy and error; its logs; cancelling it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.streams.artifact import is_committed, load_metrics
from avcil_dist.streams.stream import next_step
from avcil_dist.tracking.session import close_run, unsent
from launch.cluster.chain_record import Chain, read_chain
from launch.cluster.schedulers.base import JobState, scheduler_of
from launch.progress import ProgressRecord

TAIL_LINES = 8
FOLLOW_SECONDS = 1.0
AGE_SECONDS = 60  # the age of a progress file above which it is shown
UNEXPLAINED = ("COMMITTED", "NOT SUBMITTED", "ENDED")  # states without an error or log to show


@dataclass(frozen=True)
class StepStatus:
    """Status of a step, from its job, its status files and its artifact.

    `state`: COMMITTED, NOT SUBMITTED, FAILED, ENDED (without a known reason), or the scheduler's word. `is_live`: its
    job waits or runs.
    """

    step: int
    state: str
    job: str = ""
    nodes: str = ""
    reason: str = ""
    progress: str = ""
    seen_accuracy: float | None = None
    failure: str | None = None
    is_live: bool = False


def chain_status(stream: str) -> tuple[Chain, list[StepStatus]]:
    """Return the status of every step of a stream.

    Raises ConfigError where no jobs were submitted, ArtifactError for damaged metrics of a committed step.
    """
    chain = read_chain(stream)
    scheduler = scheduler_of(chain.kind)
    jobs = scheduler.past_jobs({stream: chain})[stream] | scheduler.live_jobs({stream: chain})[stream]
    accuracies = _seen_accuracies(stream, chain.num_steps)
    steps: list[StepStatus] = []
    for step in range(chain.num_steps):
        accuracy = accuracies[step] if step < len(accuracies) else None
        status = _step_status(chain, step, jobs.get(step), accuracy, is_committed=is_committed(stream, step))
        if status.state == "CANCELLED" and (cause := _failed_step(steps)) is not None:
            status = replace(status, reason=f"step {cause} failed")
        steps.append(status)
    return chain, steps


def print_status(stream: str, console: Console) -> None:
    """Print a table of the steps, then the error and last log lines of failed ones, then what is not uploaded yet."""
    chain, steps = chain_status(stream)
    table = Table(title=escape(f"{stream}  ({chain.kind})"), title_justify="left")
    for heading in ("step", "state", "job", "nodes", "progress", "seen accuracy"):
        table.add_column(heading, overflow="fold")
    for step in steps:
        state = f"{step.state} ({step.reason})" if step.reason not in ("", "None") and not step.failure else step.state
        accuracy = f"{step.seen_accuracy:.1%}" if step.seen_accuracy is not None else ""
        table.add_row(str(step.step), escape(state), step.job, escape(step.nodes), escape(step.progress), accuracy)
    console.print(table)
    for step in steps:
        if step.state in UNEXPLAINED or step.is_live or step.reason.startswith("step "):
            continue
        console.print(f"step {step.step}: {escape(step.failure or step.state)}", highlight=False)
        log = log_file(chain, step.step, 0)
        if log is not None:
            console.print(f"last lines of {escape(str(log))}", highlight=False)
            for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]:
                console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    reason = unsent(stream)
    if reason and not any(step.is_live for step in steps):
        console.print(
            f"not all is uploaded ({escape(reason)}); finish with: avcil sync {escape(stream)}",
            highlight=False,
            soft_wrap=True,
        )


def cancel_chain(stream: str) -> int:
    """End all jobs of a stream that wait or run. Returns their number. Committed steps and snapshots stay."""
    chain = read_chain(stream)
    count = scheduler_of(chain.kind).cancel({stream: chain})[stream]
    if count:
        close_run(chain.config(), KeyboardInterrupt)
    return count


def log_file(chain: Chain, step: int, rank: int) -> Path | None:
    """Return the log of a rank of the step's newest job, None where there is none yet."""
    job = chain.newest_job(step)
    path = chain.log_folder(step) / f"{job}_{rank}_log.out" if job else None
    return path if path is not None and path.exists() else None


def log_text(stream: str, step: int, rank: int, *, follow: bool) -> Iterator[str]:
    """Yield the log of a step's rank piece by piece; with `follow` until its job is over.

    Raises ConfigError for an unknown step, or where there is no such log.
    """
    chain = read_chain(stream)
    if step not in range(chain.num_steps):
        raise ConfigError(f"{stream}: no step {step}; it has steps 0 to {chain.num_steps - 1}")
    offset = 0
    while True:
        is_over = not (follow and chain_status(stream)[1][step].is_live)  # checked before the last read
        log = log_file(read_chain(stream), step, rank)
        if log is not None:
            with log.open("rb") as file:
                file.seek(offset)
                if piece := file.read():
                    offset += len(piece)
                    yield piece.decode(errors="replace")
        if is_over:
            break
        time.sleep(FOLLOW_SECONDS)
    if log is None:
        raise ConfigError(
            f"{stream}: step {step} has no log of rank {rank}; its job has not started (avcil status {stream})"
        )


def _step_status(
    chain: Chain, step: int, job: JobState | None, accuracy: float | None, *, is_committed: bool
) -> StepStatus:
    """Combine the job of a step (None: unknown to the scheduler), its status files and whether it is committed."""
    known_id = job.id if job else chain.newest_job(step) or ""
    status = StepStatus(step, "COMMITTED", known_id, job.nodes if job else "", seen_accuracy=accuracy)
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
    share = progress.done / max(1, progress.total)
    return f"{share:.0%}  {progress.values}".strip() + (f"  ({age} s ago)" if age > AGE_SECONDS else "")


def _failed_step(steps: list[StepStatus]) -> int | None:
    """Return the first of these steps that has ended without being committed or cancelled, or None."""
    return next(
        (step.step for step in steps if step.state not in ("COMMITTED", "CANCELLED") and not step.is_live), None
    )
