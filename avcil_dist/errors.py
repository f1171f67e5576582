"""What a user can do wrong, typed.

The command line prints such an error as one line and exits with code 2. Anything else that
is raised is a bug of ours and keeps its traceback.
"""


class AvcilError(Exception):
    """A fault outside the program: one line that says what was wrong, where, and what to do."""


class ConfigError(AvcilError):
    """A setting that is unknown, of the wrong type, impossible, or in conflict with another."""


class DataError(AvcilError):
    """A clip, shard or manifest that is missing, damaged, or not what its record says."""


class StorageError(AvcilError):
    """A storage that refuses, has no such bucket, or still does not answer at the deadline."""


class ArtifactError(AvcilError):
    """A step artifact that is missing, uncommitted, damaged, or of another stream."""


class TrainingError(AvcilError):
    """A training that cannot go on: such as a loss that is not finite."""


class RankError(TrainingError):
    """Another rank failed, or is gone, by no known fault of the settings or data; its own log says more."""


class SchedulerError(AvcilError):
    """A SLURM that is not there, does not answer, or refuses; a job that ended for good."""


class WorldError(AvcilError):
    """A process environment that does not say who this process is."""


class TrackingError(AvcilError):
    """A tracking server or database that does not answer, or refuses."""


class StepStopped(Exception):  # noqa: N818 - no error: it was asked for
    """A step that was asked to stop and has, on all ranks, with a snapshot committed; run again, it goes on there."""
