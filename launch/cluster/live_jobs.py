"""Jobs of a stream that wait or run: a condition of commands that discard what they would continue."""

import shlex

from avcil_dist import storage
from avcil_dist.errors import ConfigError, SchedulerError
from launch.cluster.chain_record import RECORD, Chain, has_chain, read_chain
from launch.cluster.schedulers.base import Scheduler, scheduler_of


def require_no_jobs(scheduler: Scheduler, stream: str, chain: Chain) -> None:
    """Check that no job of the stream waits or runs. Raises ConfigError; SchedulerError where that cannot be known."""
    if scheduler.live_jobs({stream: chain})[stream]:
        raise ConfigError(f"{stream}: its jobs wait or run; end them first: avcil cancel {shlex.quote(stream)}")


def require_no_recorded_jobs(stream: str) -> None:
    """Check as `require_no_jobs` does, where jobs of the stream were ever submitted."""
    if not has_chain(stream):
        return
    chain = read_chain(stream)
    try:
        require_no_jobs(scheduler_of(chain.kind), stream, chain)
    except SchedulerError as error:
        record = storage.join(stream, RECORD)
        raise SchedulerError(f"{error}; if no job of this stream waits or runs, remove their record {record}") from None
