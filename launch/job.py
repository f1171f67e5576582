"""One rank's part of a step as a job: what is run on a laptop, under torchrun and on a cluster alike."""

from dataclasses import dataclass

from avcil_dist.config import Config
from avcil_dist.world import World
from launch.progress import SilentProgress, StepProgress
from launch.tracked import publish_step, track_step


@dataclass(frozen=True)
class StepJob:
    """All that a rank needs to run its part of a step. Picklable, without state.

    `run_id` is the stream's, as `open_run` gives it; only rank 0 tells of the step, and nobody where it is None.
    """

    config: Config
    step: int
    num_steps: int
    run_id: str | None

    def run(self, world: World) -> None:
        """Run the part of the rank that `world` names; rank 0 also tells of it. Raises the step's AvcilError."""
        from avcil_dist.training.step import run_step  # seconds of imports, which a supervisor does not need

        config = self.config
        if not world.is_main or self.run_id is None:
            run_step(config, self.step, world=world, observer=SilentProgress())
            return
        with (
            track_step(config, self.step) as tracker,
            StepProgress(config.stream_name, self.num_steps, tracker) as progress,
        ):
            run_step(config, self.step, world=world, observer=progress)
            publish_step(config, tracker, self.num_steps)
