"""Streams of a sweep side by side on this machine: each is a process that runs `avcil train`, in a lane of its own.

The lanes share out the cores, and the GPUs if there are any. A stream's bits do not depend on its lane.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from avcil_dist.errors import StepStopped, TrainingError
from avcil_dist.exit_codes import INTERRUPTED, STOPPED
from avcil_dist.streams.stream import stream_url
from avcil_dist.system.signals import StopRequest, listening
from avcil_dist.training.device import VISIBLE, gpu_facts
from launch.cluster.lanes import machine_lanes, visible_gpus
from launch.cluster.resources import ClusterConfig
from launch.sweep import GridPoint

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class MachineLane:
    """The cores and the GPUs of a lane; no GPUs: those of the environment, if any."""

    cores: frozenset[int]
    gpus: tuple[str, ...] = ()


def make_lanes(num_parallel: int, num_streams: int, ranks: int) -> list[MachineLane]:
    """Return at most `num_parallel` lanes for streams of `ranks` processes each."""
    wanted = ClusterConfig(kind="local", max_parallel=num_parallel, tasks_per_node=ranks)
    lanes = machine_lanes(wanted, visible_gpus(gpu_facts().count, os.environ), num_streams)
    cores = share_cores(sorted(os.sched_getaffinity(0)), len(lanes))
    return [MachineLane(own, lane.gpus) for own, lane in zip(cores, lanes, strict=True)]


def share_cores(cores: Sequence[int], num_lanes: int) -> list[frozenset[int]]:
    """Share out cores evenly; more lanes than cores have one each, and several lanes have the same."""
    return [
        frozenset(cores[lane::num_lanes]) if num_lanes <= len(cores) else frozenset({cores[lane % len(cores)]})
        for lane in range(num_lanes)
    ]


def run_streams(
    config: str,
    points: Sequence[GridPoint],
    lanes: Sequence[MachineLane],
    ranks: int,
    announce: Callable[[int], None],
    *,
    smoke: bool = False,
) -> list[str]:
    """Run the streams, in their order, one at a time in each lane. Returns their folders.

    `smoke`: the points are smoke runs. `announce` is called with a stream's position as it starts. Raises TrainingError
    when one fails, after the others have stopped with a snapshot, and StepStopped and KeyboardInterrupt as `run_stream`
    does.
    """
    waiting = list(range(len(points)))
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
    failed: tuple[int, int] | None = None
    with listening() as stop, _all_ended(running):
        while running or (waiting and failed is None and not stop.is_set()):
            free = [] if failed or stop.is_set() else [lane for lane in range(len(lanes)) if lane not in running]
            for lane in free[: len(waiting)]:
                position = waiting.pop(0)
                announce(position)
                running[lane] = position, _start(config, points[position], lanes[lane], ranks, smoke=smoke)
            time.sleep(POLL_SECONDS)
            for lane, (position, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[lane]
                    failed = failed or ((position, code) if code else None)
            if failed or stop.is_set():
                _stop(running)
    folders = [stream_url(point.config) for point in points]
    _raise_end(folders, failed, stop)
    return folders


def _start(
    config: str, point: GridPoint, lane: MachineLane, ranks: int, *, smoke: bool = False
) -> "subprocess.Popen[bytes]":
    words = [config, *point.overrides, f"name={point.config.name}", "--processes", str(ranks)]
    words += ["--smoke"] if smoke else []
    environment = os.environ | ({VISIBLE: ",".join(lane.gpus)} if lane.gpus else {})
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, lane.cores)  # the process and its ranks inherit it
    try:
        command = [sys.executable, "-m", "avcil_dist", "train", *words]
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    finally:
        os.sched_setaffinity(0, before)


def _stop(running: "dict[int, tuple[int, subprocess.Popen[bytes]]]") -> None:
    """Stop every stream; each writes a snapshot."""
    for _, process in running.values():
        process.terminate()
    for _, process in running.values():
        process.wait()
    running.clear()


@contextmanager
def _all_ended(running: "dict[int, tuple[int, subprocess.Popen[bytes]]]") -> Iterator[None]:
    """End the streams that still run when the block ends by an exception, such as an interrupt."""
    try:
        yield
    finally:
        _stop(running)


def _raise_end(folders: Sequence[str], failed: tuple[int, int] | None, stop: StopRequest) -> None:
    if failed and failed[1] in (INTERRUPTED, -2):
        raise KeyboardInterrupt
    if stop.is_set() or (failed and failed[1] == STOPPED):
        raise StepStopped("the streams stopped; run the same command again to continue")
    if failed:
        raise TrainingError(
            f"{folders[failed[0]]}: its training ended with exit code {failed[1]}, its error is above; the other "
            "streams stopped; run the same command again to continue"
        )
