"""All-reduce between the nodes of a cluster, measured in a job: submitted, waited for, judged.

The job is a part of the machinery of `shards build --cluster`: one part with the nodes and ranks of the cluster file.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from avcil_dist import storage
from avcil_dist.errors import SchedulerError
from avcil_dist.world import World
from launch.cluster.chain import check_jobs_folder
from launch.cluster.code_snapshot import snapshot_folder
from launch.cluster.part_jobs import PartJobs
from launch.cluster.parts import submit_parts
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import scheduler_of
from launch.doctor import findings
from launch.doctor.findings import Finding

if TYPE_CHECKING:
    from torch import Tensor

COMMAND = "doctor-ranks"
RESULT = "all_reduce.json"
SIZES = (1 << 10, 1 << 20, 1 << 24, 1 << 26, 1 << 28)  # bytes of a tensor
MEASURE_SECONDS = 60.0  # of all sizes together
REPETITIONS = 5
LIMIT_HOURS = 4 / 60  # of the job: two minutes of measurement and a slow start
POLL_SECONDS, GRACE_SECONDS = 2.0, 30.0


class Measured(BaseModel):
    """Result of the job. `seconds` has the median time of an all-reduce by size in bytes."""

    ranks: int = Field(ge=1, le=1 << 20)
    hosts: int = Field(ge=1, le=1 << 20)
    backend: str = Field(max_length=20)
    seconds: Annotated[dict[str, float], Field(max_length=20)]


def plan_check(cluster: ClusterConfig, output: str) -> PartJobs:
    """Return the job of a check. Raises ConfigError for resources that the scheduler cannot give."""
    scheduler_of(cluster.kind).check(cluster)
    folder = Path(cluster.folder or storage.local_path(output) or ".", "doctor").absolute()
    check_jobs_folder(folder)
    code = snapshot_folder(folder)
    part, merge = (COMMAND, "reduce", "--", str(folder)), (COMMAND, "show", "--", str(folder))
    return PartJobs(
        cluster.kind, str(folder), 1, part, merge, str(code) if code else None, str(Path.cwd()), cluster.tasks
    )


def check_cluster(cluster: ClusterConfig, work: PartJobs, on_wait: Callable[[], None]) -> Finding:
    """Submit the job, wait for its end, and judge what it measured. `on_wait` is called while it waits or runs.

    Raises SchedulerError where the scheduler refuses.
    """
    scheduler = scheduler_of(cluster.kind)
    limited = cluster.model_copy(update={"hours": LIMIT_HOURS, "signal_seconds": 30, "max_requeues": 0, "steps": {}})
    result = Path(work.folder, RESULT)
    if not scheduler.live_parts(work):
        result.unlink(missing_ok=True)
    submit_parts(limited, work)
    while scheduler.live_parts(work) and not result.exists():
        on_wait()
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GRACE_SECONDS
    while not result.exists():
        failures = [failure for failure in work.failures() if failure[0] != "merge"]
        if (failures and work.code_file(failures[0][0]).exists()) or time.monotonic() > deadline:
            reason = failures[0][1] if failures else "it wrote no result"
            remedy = f"see {work.log('part_1')}"
            return Finding(
                "all-reduce",
                "fault",
                f"the job of {cluster.nodes} node{'s' * (cluster.nodes > 1)} failed: {reason}",
                remedy,
            )
        time.sleep(0.5)
    measured = storage.read_json(str(result), Measured, "a measured all-reduce", fault=SchedulerError)
    return findings.all_reduce(measured.ranks, measured.hosts, measured.backend, bus_rates(measured))


def bus_rates(measured: Measured) -> list[tuple[int, float]]:
    """Return (bytes, bytes per second) by size: of a ring, in which each rank sends 2 (n - 1) / n of the bytes."""
    share = 2 * (measured.ranks - 1) / measured.ranks
    times = sorted((int(size), seconds) for size, seconds in measured.seconds.items() if size.isdigit())
    return [(size, share * size / seconds) for size, seconds in times if seconds > 0]


def measure_all_reduce(world: World, folder: str) -> None:
    """Measure on this rank, together with all others; rank 0 writes the result. Raises WorldError, RankError."""
    import torch
    import torch.distributed as dist

    from avcil_dist.config.schema import EngineConfig
    from avcil_dist.training.collectives import process_group
    from avcil_dist.training.device import local_device
    from avcil_dist.training.engine import set_threads

    device = local_device(world)
    set_threads(world)
    seconds: dict[str, float] = {}
    with process_group(world, device, EngineConfig(meeting_minutes=2.0, timeout_minutes=2.0)):
        started = time.monotonic()
        for size in SIZES:
            tensor = torch.ones(size // 4, device=device)
            times = [_seconds(tensor) for _ in range(REPETITIONS + 1)][1:]  # the first one makes connections
            seconds[str(size)] = statistics.median(times)
            spent = torch.tensor([time.monotonic() - started], device=device)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)  # all ranks decide alike
            if float(spent) > MEASURE_SECONDS / 2:
                break
        if world.is_main:
            hosts = max(1, world.size // max(1, world.local_size))
            measured = Measured(ranks=world.size, hosts=hosts, backend=dist.get_backend(), seconds=seconds)
            storage.write_json(str(Path(folder, RESULT)), measured.model_dump())


def _seconds(tensor: "Tensor") -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
