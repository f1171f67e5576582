"""The run of one step on one rank: the same object on a laptop, under torchrun and on a cluster."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from avcil_dist.config.schema import Config
from avcil_dist.errors import AvcilError
from avcil_dist.system.plugins import trust, trusted
from avcil_dist.system.signals import StopRequest, listening
from avcil_dist.tracking.events import StepTracker
from avcil_dist.tracking.session import publish_step, track_step
from avcil_dist.training.observer import Observer
from avcil_dist.world import World
from launch.progress import ProgressBar, ProgressFile, print_warning


class MetricsObserver(Observer):
    """Each epoch's metrics in the event queue of the step's MLflow run."""

    def __init__(self, tracker: StepTracker) -> None:
        self.tracker = tracker

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue the values at MLflow's step `epoch`."""
        self.tracker.metrics(values, position=epoch)


@dataclass(frozen=True)
class StepRun:
    """Arguments of a step's run, the same for all ranks. Picklable, without state.

    `run_id` is the stream's id, as `open_run` returns it; None turns tracking and progress off.
    `reset_optimizer` and `shard_check` are as in `run_step`. Rank 0 writes its progress to `progress_file`.
    `plug_ins`: the references to code that the process which makes the run trusts.
    """

    config: Config
    step: int
    num_steps: int
    run_id: str | None
    reset_optimizer: bool = False
    progress_file: str | None = None
    shard_check: Literal["none", "step", "stream"] = "step"
    plug_ins: tuple[str, ...] = field(default_factory=trusted)

    def run(self, world: World, report: Callable[[AvcilError], None], observers: Sequence[Observer] = ()) -> None:
        """Run the step on the rank that `world` names; rank 0 also shows its progress to `observers`, and tracks it.

        On SIGTERM and SIGUSR2 the step commits a snapshot and raises StepStopped. Raises the step's AvcilError.
        An error of another rank that this rank cannot raise is passed to `report`, and the process ends.
        """
        trust(*self.plug_ins)
        with listening() as stop:
            if not world.is_main or self.run_id is None:
                self._run_step(world, stop, report, ())
                return
            with ExitStack() as stack:
                tracker = stack.enter_context(track_step(self.config, self.step, warn=print_warning))
                bar = stack.enter_context(ProgressBar(self.config.stream_name, self.num_steps))
                files = (ProgressFile(self.progress_file),) if self.progress_file else ()
                self._run_step(world, stop, report, (bar, *files, MetricsObserver(tracker), *observers))
                publish_step(self.config, tracker, self.num_steps)

    def _run_step(
        self, world: World, stop: StopRequest, report: Callable[[AvcilError], None], observers: tuple[Observer, ...]
    ) -> None:
        from avcil_dist.training.step import run_step  # seconds of imports, which a supervisor does not need

        run_step(
            self.config,
            self.step,
            world=world,
            observers=observers,
            stop=stop,
            report=report,
            reset_optimizer=self.reset_optimizer,
            shard_check=self.shard_check,
        )
