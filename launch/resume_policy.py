"""Policy of a resumed stream: which existing state to discard before it continues. `discard_state` carries it out."""

from dataclasses import dataclass

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.streams.stream import next_step, sole_writer, stream_url
from avcil_dist.training.snapshot import discard_stale


@dataclass(frozen=True)
class ResumePolicy:
    """Existing state to discard before a stream continues; by default none.

    `restart`: all committed steps and snapshots. `restart_step`: the snapshots of the next step.
    """

    restart: bool = False
    restart_step: bool = False


KEEP_ALL = ResumePolicy()


def discard_state(config: Config, policy: ResumePolicy, num_steps: int) -> int:
    """Delete the files that the policy discards, and snapshots left behind by finished steps.

    Returns the first step to run; `num_steps` when all are committed. Raises ConfigError, and deletes nothing, while
    another process trains the stream.
    """
    stream = stream_url(config)
    with sole_writer(stream):
        first = 0 if policy.restart else next_step(stream, num_steps)
        if policy.restart:
            storage.remove_tree(stream)
        discard_stale(config, first, own=policy.restart or policy.restart_step)
    return first
