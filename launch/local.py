"""Run of a stream on this machine: one set of rank processes per step.

The command's own process only supervises: it has no model and no process group. Each step's ranks are new
processes, so that no state leaks from step to step and a step is the same as in a cluster job. Under torchrun or srun
every process of the launcher supervises one rank.
"""

import itertools
import logging
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.context import BaseContext
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from avcil_dist.config.schema import Config
from avcil_dist.errors import AvcilError, StepStopped, WorldError
from avcil_dist.exit_codes import INTERRUPTED, STOPPED, USER_ERROR
from avcil_dist.streams.stream import next_step, sole_runner, stream_url
from avcil_dist.system.process_start import await_fork_server, settle_rank, starting_process, starting_worker
from avcil_dist.system.signals import StopRequest, interrupted_once, listening
from avcil_dist.tracking.session import check_tracking, stream_run
from avcil_dist.training.device import local_device
from avcil_dist.training.observer import Observer
from avcil_dist.training.preflight import preflight
from avcil_dist.training.rendezvous import check_interfaces, interfaces
from avcil_dist.world import World
from launch.call_queue import CallQueue, replay_calls
from launch.cluster.live_jobs import require_no_recorded_jobs
from launch.fork_server import rank_processes
from launch.local_worlds import launcher_world, local_worlds
from launch.progress import print_warning
from launch.resume_policy import KEEP_ALL, ResumePolicy, discard_state
from launch.step_run import StepRun

POLL_SECONDS = 0.5
GRACE_SECONDS = 4  # for ranks to end by themselves when one has failed, before they are terminated
END_SECONDS = 10  # for ranks to end on request after an interrupt, before they are killed

_meetings = itertools.count()  # of the ranks of a launcher, which all count alike


def run_stream(
    config: Config, *, processes: int | None = None, policy: ResumePolicy = KEEP_ALL, observer: Observer | None = None
) -> str:
    """Run all steps that are not committed yet. Returns the stream's folder.

    `observer` sees the progress of rank 0, in this process. Each step has `processes` ranks on this machine, by default
    one; under a launcher one rank for each of its processes, and another number is an error. Raises the step's
    AvcilError, WorldError when a rank's process died, ConfigError when another process trains the stream, and
    StepStopped when this process received a stop signal and the step has stopped.
    """
    outer = launcher_world(os.environ, processes)
    has_launcher = outer.launcher != "none"
    device = local_device(
        outer if has_launcher else World(local_size=processes or 1, size=processes or 1, launcher="local"),
        config.engine.device,
    )
    context = rank_processes(device.type)
    check_interfaces(os.environ, interfaces())
    sizes = [outer.size if has_launcher else processes or 1]
    # Under a launcher the ranks check the shards together, in the first step, instead of each for itself.
    num_steps = preflight(config, sizes, restart=policy.restart, with_shards=not has_launcher).num_steps
    check_tracking(config)
    stream = stream_url(config)
    first = 0 if policy.restart else next_step(stream, num_steps)  # before any waiting: a launcher's ranks must agree
    with sole_runner(stream) if outer.is_main else nullcontext():
        if outer.is_main:
            if policy != KEEP_ALL:
                require_no_recorded_jobs(stream)
            next_now = discard_state(config, policy, num_steps)
            first = first if has_launcher else next_now
        with listening() as stop, stream_run(config, is_main=outer.is_main, warn=print_warning) as run_id:
            if first == num_steps and outer.is_main:
                StepRun(config, num_steps - 1, num_steps, run_id).publish_unpublished()
            for step in range(first, num_steps):
                is_first = step == first
                run = StepRun(
                    config,
                    step,
                    num_steps,
                    run_id,
                    shard_check=("stream" if has_launcher else "none") if is_first else "step",
                )
                with _worlds(outer, processes) as worlds:
                    _run_step(run, worlds, stop, context, observer)
                if stop.is_set() and step + 1 < num_steps:
                    raise StepStopped(f"stopped after step {step}; run the same command again to continue")
    return stream


def _worlds(outer: World, processes: int | None) -> AbstractContextManager[tuple[World, ...]]:
    """Return the worlds of the ranks of one step which this process starts."""
    if outer.launcher != "none":
        return nullcontext((outer.at_meeting(next(_meetings)),))
    return local_worlds(processes or 1)


def _run_step(
    run: StepRun, worlds: tuple[World, ...], stop: StopRequest, context: BaseContext, observer: Observer | None
) -> None:
    """Run the step's ranks to their end, each in its own process; the first to fail ends the others.

    A stop signal of this process is forwarded to the ranks.
    """
    with starting_process(f"step {run.step}"):
        errors = context.SimpleQueue()
        calls = context.SimpleQueue() if observer else None
    if context.get_start_method() == "forkserver":
        await_fork_server(f"step {run.step}")
    ranks, is_stopping = None, False
    try:
        with starting_worker(f"step {run.step}"):
            ranks = _start(run, worlds, errors, calls, context.get_start_method())
        while not ranks.join(POLL_SECONDS, GRACE_SECONDS):
            replay_calls(calls, observer)
            if stop.is_set() and not is_stopping:
                for process in ranks.processes:
                    process.terminate()
                is_stopping = True
    except ProcessExitedException as failure:
        if failure.exit_code == INTERRUPTED:
            raise KeyboardInterrupt from None
        if failure.exit_code in (USER_ERROR, STOPPED) and not errors.empty():
            raise errors.get() from None
        end = f"signal {failure.signal_name}" if failure.signal_name else f"exit code {failure.exit_code}"
        raise WorldError(
            f"step {run.step}: the process of rank {worlds[failure.error_index].rank} ended with {end}; "
            "run the same command again to continue from the last snapshot"
        ) from None
    finally:
        _end(ranks.processes if ranks else [])
    replay_calls(calls, observer)


def _start(run: StepRun, worlds: tuple[World, ...], errors: Any, calls: Any, method: str) -> Any:
    """Start the ranks' processes."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # names each rank that it terminates
    return start_processes(_run_rank, (run, worlds, errors, calls), len(worlds), join=False, start_method=method)


def _end(processes: list[Any]) -> None:
    """End the ranks that still run, as after an interrupt: by request, and by force when that is interrupted too."""
    living = [process for process in processes if process.is_alive()]
    try:
        for process in living:
            process.terminate()
        deadline = time.monotonic() + END_SECONDS
        for process in living:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in living:
            process.kill()
            process.join()


def _run_rank(index: int, run: StepRun, worlds: tuple[World, ...], errors: Any, calls: Any) -> None:
    """Process of one rank: run the step, and pass an error to the supervisor."""
    settle_rank()
    try:
        with interrupted_once():
            run.run(worlds[index], errors.put, () if calls is None else (CallQueue(calls),))
    except AvcilError as error:
        errors.put(error)
        sys.exit(USER_ERROR)
    except StepStopped as stopped:
        errors.put(stopped)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
