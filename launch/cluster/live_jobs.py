"""Jobs of a stream that wait, run or end: what commands that discard, end or replace them have to wait for."""

import shlex
import time
from collections.abc import Callable, Mapping

from avcil_dist import storage
from avcil_dist.errors import ConfigError, SchedulerError
from launch.cluster.chain_record import RECORD, Chain, has_chain, read_chain
from launch.cluster.schedulers.base import JobState, Scheduler, scheduler_of
from launch.progress import print_warning

END_SECONDS, POLL_SECONDS = 300.0, 2.0


def wait_for_jobs(
    scheduler: Scheduler, chains: Mapping[str, Chain], is_awaited: Callable[[str, int, JobState], bool]
) -> dict[str, dict[int, JobState]]:
    """Wait until no job, given by its stream, step and state, is awaited. Returns the jobs that wait or run then.

    Raises SchedulerError where the scheduler does not answer, or a job is still awaited after END_SECONDS.
    """
    deadline, is_reported = time.monotonic() + END_SECONDS, False
    while True:
        live = scheduler.live_jobs(chains)
        awaited = [(stream, step, job) for stream in live for step, job in live[stream].items()]
        found = next((place for place in awaited if is_awaited(*place)), None)
        if found is None:
            return live
        stream, step, job = found
        text = f"{stream}: the job {job.id} of step {step} is still {job.state}"
        if time.monotonic() > deadline:
            raise SchedulerError(f"{text} after {END_SECONDS:.0f} s; try again when it has ended")
        if not is_reported:
            print_warning(f"{text}; waiting for its end")
            is_reported = True
        time.sleep(POLL_SECONDS)


def require_no_jobs(stream: str, live: Mapping[int, JobState]) -> None:
    """Check that no job of the stream waits or runs; `live` are those that do, by step. Raises ConfigError."""
    if live:
        raise ConfigError(f"{stream}: its jobs wait or run; end them first: avcil cancel {shlex.quote(stream)}")


def require_no_recorded_jobs(stream: str) -> None:
    """Check as `require_no_jobs` does, where jobs of the stream were ever submitted.

    Raises SchedulerError where the scheduler does not answer.
    """
    if not has_chain(stream):
        return
    chain = read_chain(stream)
    try:
        live = scheduler_of(chain.kind).live_jobs({stream: chain})[stream]
    except SchedulerError as error:
        record = storage.join(stream, RECORD)
        raise SchedulerError(f"{error}; if no job of this stream waits or runs, remove their record {record}") from None
    require_no_jobs(stream, live)
