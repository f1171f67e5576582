"""The run of one step on one rank: the same object on a laptop, under torchrun and on a cluster."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.errors import AvcilError
from avcil_dist.streams.stream import stream_url
from avcil_dist.system.log import set_up_log
from avcil_dist.system.plugins import trust, trusted
from avcil_dist.system.signals import StopRequest, listening
from avcil_dist.tracking.delivery import last_open
from avcil_dist.tracking.events import StepTracker
from avcil_dist.tracking.run_facts import machine_facts
from avcil_dist.tracking.session import PAGE, publish_step, publish_stream, track_step, unpublished
from avcil_dist.training.observer import Observer
from avcil_dist.world import World
from launch.progress import ProgressBar, ProgressFile, log_warning

EPOCH_NAMES = {"loss": "epoch_loss", "data": "epoch_data", "val": "val"}  # the rest is that of the last iteration


class MetricsObserver(Observer):
    """Metrics of a step in the event queue of its MLflow run, by iteration."""

    def __init__(self, tracker: StepTracker) -> None:
        self.tracker = tracker
        self._iteration = 0

    def iteration(self, iteration: int, values: Mapping[str, float]) -> None:
        """Queue the values at the iteration; those that are not finite, such as the norm after an overflow, are not."""
        self._iteration = iteration
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.tracker.metrics(finite, position=iteration, is_synced=False)  # training does not wait for the disk

    def system(self, seconds: float, values: Mapping[str, float]) -> None:
        """Queue the load of the machines."""
        self.tracker.system(values)

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Queue the values of an epoch at its last iteration."""
        parts = {name: name.partition("/") for name in values}
        named = {
            f"{EPOCH_NAMES[group]}/{name}": values[key]
            for key, (group, _, name) in parts.items()
            if group in EPOCH_NAMES
        }
        self.tracker.metrics(named, position=self._iteration)


@dataclass(frozen=True)
class StepRun:
    """Arguments of a step's run, the same for all ranks. Picklable, without state.

    `run_id` is the stream's id, as `open_run` returns it; None turns tracking and progress off.
    `shard_check` is as in `run_step`. Rank 0 writes its progress to `progress_file`.
    `plug_ins`: the references to code that the process which makes the run trusts.
    """

    config: Config
    step: int
    num_steps: int
    run_id: str | None
    progress_file: str | None = None
    shard_check: Literal["none", "step", "stream"] = "step"
    plug_ins: tuple[str, ...] = field(default_factory=trusted)

    def run(self, world: World, report: Callable[[AvcilError], None], observers: Sequence[Observer] = ()) -> None:
        """Run the step on the rank that `world` names; rank 0 also shows its progress to `observers`, and tracks it.

        On SIGTERM and SIGUSR2 the step commits a snapshot and raises StepStopped. Raises the step's AvcilError.
        An error of another rank that this rank cannot raise is passed to `report`, and the process ends.
        """
        trust(*self.plug_ins)
        set_up_log(world.rank)
        with listening() as stop:
            # seconds of imports, which a supervisor does not need
            from avcil_dist.training.device import device_name
            from avcil_dist.training.step import prepare_rank

            device = prepare_rank(self.config, self.step, world)  # before the sender's thread
            if not world.is_main or self.run_id is None:
                self._run_step(world, stop, report, ())
                return
            with ExitStack() as stack:
                facts = machine_facts(world, device_name(device))
                tracker = stack.enter_context(track_step(self.config, self.step, facts=facts, warn=log_warning))
                bar = stack.enter_context(ProgressBar(self.config.stream_name, self.num_steps))
                files = (ProgressFile(self.progress_file),) if self.progress_file else ()
                observers = (bar, *files, MetricsObserver(tracker), *observers)
                if self._run_step(world, stop, report, observers):
                    self._publish(tracker)

    def publish_unpublished(self) -> None:
        """Publish what the queue lacks of this committed step: its process was killed between the commit and that.

        A stream without a queue here was published by another machine.
        """
        opened = last_open(stream_url(self.config))
        if opened is not None and unpublished(self.config, opened.queue, self.step, self.num_steps):
            with track_step(self.config, self.step, warn=log_warning) as tracker:
                self._publish(tracker)

    def _publish(self, tracker: StepTracker) -> None:
        """Publish what the queue lacks of the committed step, and after the last one the stream with its report."""
        publish_step(self.config, tracker, self.num_steps)
        if self.step + 1 == self.num_steps:
            self._write_page()
            publish_stream(tracker)

    def _write_page(self) -> None:
        """Write the report of a finished stream to its folder."""
        from avcil_dist.reporting.page import write_page  # a second of imports
        from avcil_dist.reporting.report import load_streams

        stream = stream_url(self.config)
        write_page(load_streams([stream]), storage.join(stream, PAGE))

    def _run_step(
        self, world: World, stop: StopRequest, report: Callable[[AvcilError], None], observers: tuple[Observer, ...]
    ) -> bool:
        """Run the step; whether this process and its peers committed it."""
        from avcil_dist.training.step import run_step  # seconds of imports, which a supervisor does not need

        artifact = run_step(
            self.config,
            self.step,
            world=world,
            observers=observers,
            stop=stop,
            report=report,
            shard_check=self.shard_check,
        )
        return artifact is not None
