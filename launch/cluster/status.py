"""What has become of a chain of jobs: each step's state, where it runs, how far it is, why it failed."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.streams.artifact import is_committed, step_url
from avcil_dist.tracking.session import close_run, unsent
from launch.cluster.chain_record import Chain, read_chain
from launch.cluster.schedulers.slurm import JobState, cancel_jobs, live_jobs, past_jobs
from launch.cluster.supervisor import is_supervised, stop_supervisor

TAIL_LINES = 8
FOLLOW_SECONDS = 1.0
QUIET = ("COMMITTED", "NOT SUBMITTED", "ENDED")  # of these there is nothing to explain
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "WAITING")


@dataclass(frozen=True)
class StepStatus:
    """A step as its job, its marks and its artifact tell. `state`: COMMITTED, NOT SUBMITTED, ENDED, or SLURM's word."""

    step: int
    state: str
    job: str = ""
    nodes: str = ""
    reason: str = ""
    progress: str = ""
    seen_accuracy: float | None = None
    failure: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether its job waits or runs."""
        return self.state in LIVE


def chain_status(stream: str) -> tuple[Chain, list[StepStatus]]:
    """Every step of a stream. Raises ConfigError for a stream of which no jobs were submitted."""
    chain = read_chain(stream)
    jobs = _slurm_jobs(chain) if chain.kind == "slurm" else _local_jobs(stream, chain)
    metrics = _last_metrics(stream, chain.num_steps)
    accuracies = metrics.get("seen_accuracy", [])
    steps: list[StepStatus] = []
    for step in range(chain.num_steps):
        found = jobs.get(step)
        failure = chain.failure(step)
        if is_committed(stream, step):
            state, reason, progress, failure = "COMMITTED", "", "", None
        elif found is None:
            state, reason, progress = _state_without_job(chain, step, failure), "", ""
        else:
            state = "FAILED" if failure and not found.is_live else found.state
            reason, progress = found.reason, _progress(chain, step)
        if state == "CANCELLED" and (culprit := _culprit(steps)) is not None:
            reason = f"step {culprit} failed"
        steps.append(
            StepStatus(
                step=step,
                state=state,
                job=found.id if found else (chain.jobs.get(step) or ("",))[-1],
                nodes=found.nodes if found else "",
                reason=reason,
                progress=progress,
                seen_accuracy=accuracies[step] if step < len(accuracies) else None,
                failure=failure,
            )
        )
    return chain, steps


def print_status(stream: str, console: Console) -> None:
    """A table of the steps; of failed ones the reason and the last lines of the log; what no server was told yet."""
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
        if step.state in QUIET or step.is_live or step.reason.startswith("step "):
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
    """End all jobs of a stream that wait or run; how many. Committed steps and snapshots stay."""
    chain = read_chain(stream)
    if chain.kind == "local":
        count = int(stop_supervisor(chain.folder))
    else:
        ids = [job.id for job in live_jobs(chain.job_prefix)]
        cancel_jobs(sorted(ids, key=int, reverse=True))  # none begins because the one before it ends
        count = len(ids)
    if count:
        close_run(chain.config(), KeyboardInterrupt)
    return count


def log_file(chain: Chain, step: int, rank: int) -> Path | None:
    """The log of a rank of the step's newest job, if it has one."""
    ids = chain.jobs.get(step)
    path = chain.logs(step) / f"{ids[-1]}_{rank}_log.out" if ids else None
    return path if path is not None and path.exists() else None


def log_text(stream: str, step: int, rank: int, *, follow: bool) -> Iterator[str]:
    """The log of a step's rank, piece by piece; `follow`: until its job is over. Raises ConfigError without one."""
    chain = read_chain(stream)
    if step not in range(chain.num_steps):
        raise ConfigError(f"{stream}: no step {step}; it has steps 0 to {chain.num_steps - 1}")
    offset = 0
    while True:
        is_over = not (follow and chain_status(stream)[1][step].is_live)  # asked before the last read
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
            f"{stream}: step {step} has no log of rank {rank}; its job has not begun (avcil status {stream})"
        )


def _slurm_jobs(chain: Chain) -> dict[int, JobState]:
    newest = {step: ids[-1] for step, ids in chain.jobs.items() if ids}
    live = {job.id: job for job in live_jobs(chain.job_prefix)}
    past = past_jobs(id for id in newest.values() if id not in live)
    found = live | past
    return {step: found[id] for step, id in newest.items() if id in found}


def _local_jobs(stream: str, chain: Chain) -> dict[int, JobState]:
    """Of a chain on this machine: the first step that is not committed runs while the chain does, the others wait."""
    if not is_supervised(chain.folder):
        return {}
    todo = [step for step in range(chain.num_steps) if not is_committed(stream, step)]
    return {
        step: JobState(
            id=(chain.jobs.get(step) or ("",))[-1],
            name=chain.job_name(step),
            state="RUNNING" if step == todo[0] else "WAITING",
            nodes="this machine" if step == todo[0] else "",
            reason="",
            is_live=True,
        )
        for step in todo
    }


def _state_without_job(chain: Chain, step: int, failure: str | None) -> str:
    """The state of a step of whose jobs nobody knows any more."""
    if failure:
        return "FAILED"
    return "ENDED" if chain.jobs.get(step) else "NOT SUBMITTED"


def _last_metrics(stream: str, num_steps: int) -> dict[str, Any]:
    """The metrics of the last committed step, which hold those of all steps before it."""
    for step in reversed(range(num_steps)):
        if is_committed(stream, step):
            return dict(storage.read_json(storage.join(step_url(stream, step), "metrics.json")))
    return {}


def _progress(chain: Chain, step: int) -> str:
    try:
        note = storage.read_json(chain.note(step))
    except DataError:
        return ""
    age = max(0, int(time.time() - note["time"]))
    share = note["done"] / max(1, note["total"])
    return f"{share:.0%}  {note['values']}".strip() + (f"  ({age} s ago)" if age > 60 else "")


def _culprit(steps: list[StepStatus]) -> int | None:
    """The step that failed, of those before."""
    return next(
        (step.step for step in steps if step.state not in ("COMMITTED", "CANCELLED") and not step.is_live), None
    )
