"""One rank's part of a step as a job: what is run on a laptop, under torchrun and on a cluster alike."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from avcil_dist.config.schema import Config
from avcil_dist.errors import AvcilError
from avcil_dist.signals import listening
from avcil_dist.tracking.session import publish_step, track_step
from avcil_dist.world import World
from launch.progress import SilentProgress, StepProgress


@dataclass(frozen=True)
class StepRun:
    """All that a rank needs to run its part of a step. Picklable, without state.

    `run_id` is the stream's, as `open_run` gives it; only rank 0 tells of the step, and nobody where it is None.
    `reset_optimizer` lets the step go on from a snapshot with a fresh optimizer. `note` is a file that rank 0
    keeps, of how far it is.
    """

    config: Config
    step: int
    num_steps: int
    run_id: str | None
    reset_optimizer: bool = False
    note: str | None = None

    def run(self, world: World, report: Callable[[AvcilError], None]) -> None:
        """Run the part of the rank that `world` names; rank 0 also shows and tracks it.

        SIGTERM and SIGUSR2 stop the step once a snapshot is committed. Raises StepStopped then, or the step's
        AvcilError; where another rank's error cannot be raised, it is reported and the process ends.
        """
        from avcil_dist.training.step import run_step  # seconds of imports, which a supervisor does not need

        config = self.config
        with listening() as stop:
            part = partial(
                run_step,
                config,
                self.step,
                world=world,
                stop=stop,
                report=report,
                reset_optimizer=self.reset_optimizer,
            )
            if not world.is_main or self.run_id is None:
                part(observer=SilentProgress())
                return
            with (
                track_step(config, self.step) as tracker,
                StepProgress(config.stream_name, self.num_steps, tracker, self.note) as progress,
            ):
                part(observer=progress)
                publish_step(config, tracker, self.num_steps)
