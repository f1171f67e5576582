"""Protocol of a scheduler, the system that runs the jobs of a chain.

A module `NAME.py` of this folder defines `SCHEDULER`, the scheduler of cluster files with `kind: NAME`. Modules that
belong to it are named `NAME_*.py`. A further scheduler is one such module and a cluster file.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from avcil_dist.config.schema import Config
from avcil_dist.system.plugins import check_name, load_plug_in
from avcil_dist.world import World
from launch.cluster.chain_record import Chain
from launch.cluster.part_jobs import PartJobs
from launch.cluster.resources import ClusterConfig


@dataclass(frozen=True)
class JobState:
    """State of a job.

    `state`: the scheduler's own word, but CANCELLED for every job that was ended by a user or for lack of the job
    before it. `nodes`: the machines that it runs on. `is_live`: it waits, runs, or is about to start again.
    `is_ending`: a live job that ends, or starts again, which the scheduler does not show yet.
    `elapsed` and `limit`: its time, in the words of the scheduler. `restarts`: how often it was started again.
    """

    id: str
    state: str
    nodes: str
    reason: str
    is_live: bool
    elapsed: str = ""
    limit: str = ""
    restarts: int = 0
    is_ending: bool = False


@dataclass(frozen=True)
class Lane:
    """Place of chains that run one after the other, beside those of other lanes: `cluster` with its GPUs by name."""

    cluster: ClusterConfig
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobStart:
    """Conditions under which a chain's jobs start.

    `run_id`: the stream's id, see `open_run`. `first_step`: the first step that is not committed. `after`: the
    `last_job` of other chains; the first step starts once all have ended, successfully or not. `gpus`:
    the names of the GPUs of the chain's lane.
    """

    run_id: str
    first_step: int
    after: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()


class Scheduler(Protocol):
    """A scheduler. Its methods raise SchedulerError when it does not answer or refuses."""

    def check(self, cluster: ClusterConfig) -> None:
        """Check the resources of every step. Raises ConfigError for those that the scheduler cannot give."""

    def require(self) -> None:
        """Check that the scheduler can be used from this machine. Raises SchedulerError."""

    def lanes(self, cluster: ClusterConfig, num_streams: int) -> list[Lane]:
        """Return the lanes for this number of streams, at most `max_parallel`, with the resources of their jobs."""

    def submit(
        self, config: Config, cluster: ClusterConfig, chain: Chain, steps: Sequence[int], start: JobStart
    ) -> Chain:
        """Submit a job for each of the steps, each after the job of the step before it succeeded.

        Returns the record with the new jobs; it is also written, at the latest as each job starts.
        """

    def live_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        """Return for each stream the jobs that wait or run, by step."""

    def past_jobs(self, chains: Mapping[str, Chain]) -> dict[str, dict[int, JobState]]:
        """Return for each stream the last known state of each step's newest job; a job may be unknown by now."""

    def last_job(self, chain: Chain) -> str:
        """Return what `JobStart.after` of another chain names to wait for the end of this chain."""

    def cancel(self, chains: Mapping[str, Chain], first_step: int = 0) -> dict[str, int]:
        """End the jobs that wait or run, of the steps from `first_step` on, for good. Returns their number by stream.

        No job of these streams starts because another one has ended.
        """

    def script(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> str:
        """Return the script that would be submitted for a step. `previous`: the id of the job that it waits for."""

    def options(self, chain: Chain, cluster: ClusterConfig, step: int, previous: str | None) -> dict[str, str]:
        """Return the options in the script of a step, by name."""

    def submit_parts(self, cluster: ClusterConfig, work: PartJobs) -> None:
        """Submit a job for each part of a build, and one that merges them after all have succeeded."""

    def live_parts(self, work: PartJobs) -> list[JobState]:
        """Return the jobs of a build by parts that wait or run."""

    def parts_script(self, cluster: ClusterConfig, work: PartJobs) -> str:
        """Return the scripts that `submit_parts` would submit."""

    def cancel_command(self, work: PartJobs) -> str:
        """Return a shell command that ends the jobs of a build by parts."""

    def world(self, port: int) -> World:
        """Return the world of the calling rank. `port`: reserved for ranks that meet on one machine."""


def scheduler_kinds() -> list[str]:
    """Return the names of the built-in schedulers."""
    names = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in names if "_" not in name and name != "base")


def scheduler_of(kind: str) -> Scheduler:
    """Return the scheduler of this kind: a built-in one, or an installed plug-in's object.

    Raises ConfigError as `load_plug_in` does.
    """
    built_in = scheduler_kinds()
    if kind not in built_in:
        found: Scheduler = load_plug_in("cluster file: kind", kind, "schedulers", built_in)
        return found
    check_name("cluster file: kind", kind, "schedulers", built_in)
    scheduler: Scheduler = importlib.import_module(f"launch.cluster.schedulers.{kind}").SCHEDULER
    return scheduler
