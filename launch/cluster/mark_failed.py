"""Says that a step failed for good: beside the logs, and of the stream in MLflow.

Run as `python -m launch.cluster.mark_failed FOLDER STEP TEXT` by a job's script, whose
ranks may have been killed at each start.
"""

import sys
from contextlib import suppress

from avcil_dist.config.schema import Config
from avcil_dist.errors import SchedulerError, TrackingError
from avcil_dist.tracking.session import close_run
from launch.cluster.chain_record import config_in, mark_failed


def give_up(config: Config, folder: str, step: int, text: str) -> None:
    """Write the step's mark, which ends the chain, and end the stream's run as FAILED."""
    mark_failed(folder, step, text)
    with suppress(TrackingError):
        close_run(config, SchedulerError)


if __name__ == "__main__":
    give_up(config_in(sys.argv[1]), sys.argv[1], int(sys.argv[2]), sys.argv[3])
