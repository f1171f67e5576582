"""Typed errors for faults outside the program: settings, data, storage, servers, schedulers.

The command line prints such an error as one line and exits with code 2. Any other exception is a bug and keeps its
traceback.
"""

from avcil_dist.text.redaction import redacted
from avcil_dist.text.visible import visible


class AvcilError(Exception):
    """A fault outside the program. The message is one line: what was wrong, where, and what to do, no secrets."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(argument) if isinstance(argument, str) else argument for argument in args))

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows of the error, in a notebook too: the one line. `%debug` still has the frames."""
        return [f"{type(self).__name__}: {visible(str(self))}"]


class ConfigError(AvcilError):
    """A setting that is unknown, of the wrong type, impossible, or in conflict with another."""


class DataError(AvcilError):
    """A clip, shard or manifest that is missing, damaged, or different from the manifest."""


class StorageError(AvcilError):
    """A storage that refuses access, lacks the bucket, or does not respond before the deadline."""


class ArtifactError(AvcilError):
    """A step artifact that is missing, uncommitted, damaged, or of another stream."""


class TrainingError(AvcilError):
    """A training that cannot continue, such as one with a loss that is not finite."""


class RankError(TrainingError):
    """A failure of another rank, or its loss, without a known fault of settings or data; see that rank's log."""


class SchedulerError(AvcilError):
    """A scheduler that is missing, does not respond, or refuses; a job that failed permanently."""


class WorldError(AvcilError):
    """A process environment without a rank or world size, or with contradictory ones."""


class TrackingError(AvcilError):
    """A tracking server or database that does not respond, or refuses a request."""


class StepStopped(Exception):  # noqa: N818 - not an error: the stop was requested
    """A step that stopped on request, on all ranks, with a snapshot committed; the next run continues from it."""
