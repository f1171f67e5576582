"""Runs of the streams of a grid: on this machine, one after the other or side by side, or as chains of jobs."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from avcil_dist.errors import ConfigError
from avcil_dist.streams.stream import stream_url
from avcil_dist.world import world_from_environment
from launch.cluster.chain import kept_events_note, kept_streams, submit_stream
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import Lane, scheduler_of
from launch.local import run_stream
from launch.parallel_streams import make_lanes, run_streams
from launch.resume_policy import KEEP_ALL, ResumePolicy
from launch.sweep import GridPoint


def run_points(
    config: str,
    points: Sequence[GridPoint],
    processes: int | None,
    show: Callable[[str], None],
    *,
    parallel: int = 1,
    smoke: bool = False,
) -> list[str]:
    """Train the streams of a configuration, `parallel` at a time; committed steps are skipped. Returns their folders.

    `show` is called with a line for each stream before it starts.
    """

    def announce(position: int) -> None:
        point = points[position]
        show(f"{position + 1}/{len(points)}  {point.config.stream_name}  {' '.join(point.overrides)}")

    if parallel > 1:
        ranks = processes or 1
        return run_streams(config, points, make_lanes(parallel, len(points), ranks), ranks, announce, smoke=smoke)
    folders = []
    for position, point in enumerate(points):
        announce(position)
        folders.append(run_stream(point.config, processes=processes, policy=ResumePolicy(restart=smoke)))
    return folders


def check_parallel(cluster: str | None) -> None:
    """Raise ConfigError for --parallel where a scheduler, or a launcher around this process, shares out the machine."""
    if cluster is not None:
        raise ConfigError("--parallel: with --cluster, set cluster.max_parallel")
    if (launcher := world_from_environment(os.environ).launcher) != "none":
        raise ConfigError(f"--parallel: {launcher} started this process; start the sweep without it")


class GridSubmission(NamedTuple):
    """Submitted streams, the number of their jobs that wait or run, and a line on tracking events that jobs keep."""

    points: Sequence[GridPoint]
    num_jobs: int
    note: str | None

    @property
    def output(self) -> str:
        """The folder of the streams."""
        return self.points[0].config.output


def submit_grid(
    make_points: Callable[[int], Sequence[GridPoint]],
    num_streams: int,
    resources: ClusterConfig,
    show: Callable[[str], None],
    policy: ResumePolicy = KEEP_ALL,
) -> GridSubmission:
    """Submit streams as chains, in lanes of chains that follow one another.

    `make_points` returns the streams for a number of ranks, which the lanes of `num_streams` determine. `show` is
    called with a line for each stream, first for those whose jobs wait or run already.
    """
    lanes = scheduler_of(resources.kind).lanes(resources, num_streams)
    points = make_points(lanes[0].cluster.world_size)
    num_jobs = _submit(points, resources, lanes, show, policy)
    first = points[0].config
    return GridSubmission(points, num_jobs, kept_events_note(first, resources, first.output) if num_jobs else None)


def _submit(
    points: Sequence[GridPoint],
    resources: ClusterConfig,
    lanes: Sequence[Lane],
    show: Callable[[str], None],
    policy: ResumePolicy,
) -> int:
    """Submit streams; a new chain waits for all that its lane has. Returns the number of jobs that wait or run."""
    last_jobs: list[list[str]] = [[] for _ in lanes]
    kept = kept_streams((point.config for point in points), resources)
    jobs = 0
    for number, point in sorted(enumerate(points), key=lambda item: stream_url(item[1].config) not in kept):
        queue = number % len(lanes)
        submission = submit_stream(point.config, resources, policy=policy, after=last_jobs[queue], lane=lanes[queue])
        if submission.last is not None:
            before = last_jobs[queue] if submission.kept else []  # a new chain is the last of its lane
            last_jobs[queue] = [*before, submission.last]
        new, old = len(submission.new), len(submission.kept)
        jobs += new + old
        jobs_line = f"{new} submitted, {old} wait or run already" if new or old else "all steps are committed"
        show(f"{submission.stream}: {jobs_line}")
    return jobs
