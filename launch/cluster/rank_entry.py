"""Entry point of one rank of a submitted job; it runs the rank's part of a step and writes the step's status file.

The job's script and `avcil status` read the status files `step_003.done` and `step_003.failed`. Without one of them the
job is started again, and the step continues from its last snapshot.
"""

import logging
import signal
import sys
from dataclasses import dataclass
from functools import partial

from submitit.helpers import DelayedSubmission

from avcil_dist import storage
from avcil_dist.errors import AvcilError, RankError, StepStopped, StorageError
from avcil_dist.exit_codes import REQUEUE, USER_ERROR
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import is_committed
from avcil_dist.system.process_start import end_with_parent
from avcil_dist.system.signals import STOP_SIGNALS
from avcil_dist.tracking.session import close_run, open_run
from avcil_dist.training.failure_sync import print_fault
from avcil_dist.world import World
from launch.cluster.chain_record import done_file, mark_failed
from launch.cluster.mark_failed import fail_stream
from launch.cluster.schedulers.base import scheduler_of
from launch.step_run import StepRun

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankEntry:
    """Callable that submitit pickles once for all ranks of a step's job.

    `folder`: of the chain. `kind`: of its scheduler. `port`: reserved for ranks that meet on one machine.
    """

    run: StepRun
    folder: str
    kind: str
    port: int = 0

    def __call__(self) -> None:
        """Run this process's rank. The exit code is REQUEUE for an error that may not occur again."""
        end_with_parent()  # a restarted job must not run beside ranks of the old one
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # pending until the step handles them, not submitit
        try:
            world = scheduler_of(self.kind).world(self.port)
        except AvcilError as error:
            self._report(error, is_main=False)
            sys.exit(USER_ERROR)
        code = self._run(world)
        # Rank 0 needs more time to finish than the others. Another rank's exit code would make srun kill it.
        if world.is_main and code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Resubmit the same callable: all state is in the snapshots."""
        return DelayedSubmission(self)

    def _run(self, world: World) -> int:
        """Run the rank. Returns its exit code."""
        run, config = self.run, self.run.config
        report = partial(self._report, is_main=world.is_main)
        try:
            if not is_committed(stream_url(config), run.step):
                run.run(world, report)
            elif world.is_main:
                open_run(config)
                run.publish_unpublished()
            if world.is_main:
                if run.step + 1 == run.num_steps:
                    close_run(config, None)
                done = done_file(self.folder, run.step)
                with storage.writing(done):
                    done.touch()
        except StepStopped as stopped:
            _logger.info("avcil: %s", stopped)
            return REQUEUE
        except AvcilError as error:
            report(error)
            return REQUEUE if isinstance(error, RankError) else USER_ERROR
        return 0

    def _report(self, error: AvcilError, *, is_main: bool) -> None:
        """Print an error; one that would occur again also ends the chain, and the stream's MLflow run."""
        print_fault(error)
        if isinstance(error, RankError):
            return
        try:
            if is_main:
                fail_stream(self.run.config, self.folder, self.run.step, str(error))
            else:
                mark_failed(self.folder, self.run.step, str(error))
        except StorageError as fault:  # a full disk, which may be the first error too: the job is started again
            print_fault(fault)
