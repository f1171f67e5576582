"""One task of a submitted job, which is one rank of a step; how the step ended is written beside the logs.

`step_003.done` and `step_003.failed` (with the error's line) are what the job's script and `avcil status`
go by; where there is neither, the job may begin again, and the step goes on from its last snapshot.
"""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from submitit.helpers import DelayedSubmission

from avcil_dist.errors import AvcilError, RankError, StepStopped
from avcil_dist.exit_codes import REQUEUE, USER_ERROR
from avcil_dist.signals import STOP_SIGNALS
from avcil_dist.streams.artifact import is_committed
from avcil_dist.streams.stream import stream_url
from avcil_dist.tracking.session import close_run, open_run
from avcil_dist.training.engine import name_accelerator
from avcil_dist.training.failure_sync import print_fault
from avcil_dist.world import World, world_from_environment
from launch.cluster.chain_record import DONE, mark_failed, mark_of
from launch.cluster.mark_failed import give_up
from launch.step_run import StepRun

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankEntry:
    """The same object for every task of a step's job; submitit pickles it. `port`: where ranks of one machine meet."""

    job: StepRun
    folder: str
    port: int = 0

    def __call__(self) -> None:
        """Run this task's rank to its end."""
        _end_with_parent()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they wait for the step to listen, not for submitit
        name_accelerator()
        try:
            world = self._world()
        except AvcilError as error:
            self._report(error, is_main=False)
            sys.exit(USER_ERROR)
        code = self._run(world)
        # The ranks end together, and rank 0 has more to finish: srun would end it for another's exit code.
        if world.is_main and code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """ResumePolicy again as it is: the snapshots are the state."""
        return DelayedSubmission(self)

    def _run(self, world: World) -> int:
        """Run the rank; its exit code."""
        config, job = self.job.config, self.job
        report = partial(self._report, is_main=world.is_main)
        try:
            if not is_committed(stream_url(config), job.step):
                job.run(world, report)
            elif world.is_main:
                open_run(config)  # tells what a job that was ended between commit and report did not
        except StepStopped as stopped:
            sys.stderr.write(f"avcil: {stopped}\n")
            return REQUEUE
        except AvcilError as error:
            report(error)
            return REQUEUE if isinstance(error, RankError) else USER_ERROR
        if world.is_main:
            if job.step + 1 == job.num_steps:
                close_run(config, None)
            Path(f"{mark_of(self.folder, job.step)}.{DONE}").touch()
        return 0

    def _report(self, error: AvcilError, *, is_main: bool) -> None:
        """To the log; an error that would come again ends the chain, and the stream's run."""
        print_fault(error)
        if isinstance(error, RankError):
            return
        if is_main:
            give_up(self.job.config, self.folder, self.job.step, str(error))
        else:
            mark_failed(self.folder, self.job.step, str(error))

    def _world(self) -> World:
        """SLURM's, or that of submitit's local executor."""
        if os.environ.get("SUBMITIT_EXECUTOR") != "local":
            return world_from_environment(os.environ)
        rank, size = int(os.environ["SUBMITIT_LOCAL_GLOBALID"]), int(os.environ["SUBMITIT_LOCAL_NTASKS"])
        return World(rank, size, rank, size, "127.0.0.1", self.port, launcher="local")


def _end_with_parent() -> None:
    """A rank whose node's daemon is gone must not train on beside the job that takes its place (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
