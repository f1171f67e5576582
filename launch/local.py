"""Runs a stream on the machine at hand: one set of processes per step.

The command line's process only supervises: it holds no model and no process group. Each step's
ranks are fresh processes, so nothing leaks from step to step, and a step here is what a cluster
job is. Under torchrun or srun every rank supervises one process of its own.
"""

import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from typing import Any

import torch.cuda
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from avcil_dist.config.schema import Config
from avcil_dist.errors import AvcilError, StepStopped, WorldError
from avcil_dist.exit_codes import INTERRUPTED, STOPPED, USER_ERROR
from avcil_dist.signals import StopRequest, listening, shielding
from avcil_dist.streams.stream import next_step, stream_url
from avcil_dist.tracking.session import stream_run
from avcil_dist.training.engine import name_accelerator
from avcil_dist.training.preflight import check_run
from avcil_dist.world import World, world_from_environment
from launch.progress import print_warning
from launch.resume_policy import KEEP_ALL, ResumePolicy, discard_state
from launch.step_run import StepRun

POLL_SECONDS = 0.5
GRACE_SECONDS = 4  # for ranks to end by themselves when one has failed, before they are made to
PRELOADED = ["torch", "deepspeed", "avcil_dist.training.step", "avcil_dist.tracking.mlflow_writer"]


def run_stream(config: Config, *, processes: int, policy: ResumePolicy = KEEP_ALL) -> str:
    """Run all steps that are not committed yet; returns the stream's folder.

    With no launcher around, each step gets `processes` ranks on this machine; otherwise the
    launcher's. Raises the step's AvcilError, WorldError when a process died, StepStopped when this
    process was asked to stop and the step has.
    """
    place = world_from_environment(os.environ)
    has_launcher = place.launcher != "none"
    num_steps = check_run(config, place.size if has_launcher else processes, restart=policy.restart).num_steps
    stream = stream_url(config)
    first = 0 if policy.restart else next_step(stream, num_steps)
    if place.is_main:
        discard_state(config, policy, num_steps)
    with listening() as stop, stream_run(config, is_main=place.is_main, warn=print_warning) as run_id:
        for step in range(first, num_steps):
            worlds = (_rank_of(place, step),) if has_launcher else local_worlds(processes)
            _run_job(StepRun(config, step, num_steps, run_id, policy.reset_optimizer and step == first), worlds, stop)
            if stop.is_set() and step + 1 < num_steps:
                raise StepStopped(f"stopped after step {step}; run the same command again and step {step + 1} begins")
    return stream


def local_worlds(processes: int) -> tuple[World, ...]:
    """The worlds of `processes` ranks on this machine, which meet at a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return tuple(
        World(rank, processes, rank, processes, "127.0.0.1", port, launcher="local") for rank in range(processes)
    )


def current_world() -> World:
    """The world of the launcher around this process, or a world of this process alone."""
    world = world_from_environment(os.environ)
    return world if world.launcher != "none" else replace(local_worlds(1)[0], launcher="none")


def _rank_of(place: World, step: int) -> World:
    """The launcher's rank, with a port of its own for each step: the launcher itself uses the first."""
    return replace(place, master_port=place.master_port + 1 + step)


def _run_job(job: StepRun, worlds: tuple[World, ...], stop: StopRequest) -> None:
    """Run the job's ranks to their end, each in a process of its own; the first to fail ends the others.

    A stop that is asked of this process is asked of them.
    """
    # A forked process cannot use a GPU that its parent has looked at; without GPUs, forking saves seconds a step.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(PRELOADED)
    name_accelerator()
    errors = context.SimpleQueue()
    try:
        with shielding():
            ranks = start_processes(_run_rank, (job, worlds, errors), len(worlds), join=False, start_method=method)
        is_told = False
        while not ranks.join(POLL_SECONDS, GRACE_SECONDS):
            if stop.is_set() and not is_told:
                for process in ranks.processes:
                    process.terminate()
                is_told = True
    except ProcessExitedException as failure:
        if failure.exit_code == INTERRUPTED:
            raise KeyboardInterrupt from None
        if failure.exit_code in (USER_ERROR, STOPPED) and not errors.empty():
            raise errors.get() from None
        how = f"signal {failure.signal_name}" if failure.signal_name else f"exit code {failure.exit_code}"
        raise WorldError(
            f"step {job.step}: the process of rank {worlds[failure.error_index].rank} ended with {how}; "
            "run the same command again to continue from the last snapshot"
        ) from None


def _run_rank(index: int, job: StepRun, worlds: tuple[World, ...], errors: Any) -> None:
    """One rank's process: run its part of the step, hand an error to the supervisor."""
    try:
        job.run(worlds[index], errors.put)
    except AvcilError as error:
        errors.put(error)
        sys.exit(USER_ERROR)
    except StepStopped as stopped:
        errors.put(stopped)
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
