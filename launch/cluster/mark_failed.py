"""Mark a step as failed for good: in its status file, and in the stream's MLflow run.

Run as `python -m launch.cluster.mark_failed FOLDER STEP TEXT` by a job's script when no start of the job succeeded.
"""

import sys
from contextlib import suppress

from avcil_dist.config.schema import Config
from avcil_dist.errors import SchedulerError, TrackingError
from avcil_dist.tracking.session import close_run
from launch.cluster.chain_record import frozen_config, mark_failed


def fail_stream(config: Config, folder: str, step: int, text: str) -> None:
    """Mark a step as failed, and end the stream's MLflow run as FAILED."""
    mark_failed(folder, step, text)
    with suppress(TrackingError):
        close_run(config, SchedulerError)


if __name__ == "__main__":
    fail_stream(frozen_config(sys.argv[1]), sys.argv[1], int(sys.argv[2]), sys.argv[3])
