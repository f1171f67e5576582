"""Says that a step did not get done in all its starts: beside the logs, and of the stream in MLflow.

Run as `python -m launch.giveup FOLDER STEP TEXT` by a job's script, whose ranks may have been killed.
"""

import sys
from contextlib import suppress
from pathlib import Path

from avcil_dist.compose import config_from_yaml
from avcil_dist.config import Config
from avcil_dist.errors import SchedulerError, TrackingError
from launch.record import CONFIG, FAILED, mark_of
from launch.tracked import close_run


def give_up(config: Config, folder: str, step: int, text: str) -> None:
    """Write the step's mark, which ends the chain, and end the stream's run as FAILED."""
    Path(f"{mark_of(folder, step)}.{FAILED}").write_text(f"{text}\n")
    with suppress(TrackingError):
        close_run(config, SchedulerError)


if __name__ == "__main__":
    give_up(config_from_yaml(Path(sys.argv[1], CONFIG).read_text()), sys.argv[1], int(sys.argv[2]), sys.argv[3])
