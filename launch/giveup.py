"""Says that a step failed for good: beside the logs, and of the stream in MLflow.

Run as `python -m launch.giveup FOLDER STEP TEXT` by a job's script, whose ranks may have been killed at each start.
"""

import sys
from contextlib import suppress

from avcil_dist.config import Config
from avcil_dist.errors import SchedulerError, TrackingError
from launch.record import config_in, mark_failed
from launch.tracked import close_run


def give_up(config: Config, folder: str, step: int, text: str) -> None:
    """Write the step's mark, which ends the chain, and end the stream's run as FAILED."""
    mark_failed(folder, step, text)
    with suppress(TrackingError):
        close_run(config, SchedulerError)


if __name__ == "__main__":
    give_up(config_in(sys.argv[1]), sys.argv[1], int(sys.argv[2]), sys.argv[3])
