"""Lanes of a machine: the GPUs of each of the chains that run on it at the same time. No two lanes share one."""

from collections.abc import Mapping, Sequence

from avcil_dist.errors import ConfigError
from avcil_dist.training.device import NO_DEVICES, VISIBLE
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import Lane


def visible_gpus(count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the `count` GPUs that torch sees in this environment, as CUDA_VISIBLE_DEVICES lists them."""
    listed = environment.get(VISIBLE, "")
    if listed in NO_DEVICES:
        return tuple(map(str, range(count)))
    return tuple(name.strip() for name in listed.split(","))[:count]


def machine_lanes(cluster: ClusterConfig, gpus: Sequence[str], num_streams: int) -> list[Lane]:
    """Return the lanes of `num_streams` streams on a machine with these GPUs, at most `max_parallel`.

    A lane has as many GPUs as its largest step requests; by default the machine's GPUs are shared out evenly, at most
    `tasks_per_node` to a lane. Raises ConfigError where one lane needs more GPUs than there are.
    """
    most = max(1, min(cluster.max_parallel, num_streams))
    requested = [cluster.at(step).gpus_per_node for step in sorted({0, *cluster.steps})]
    needed = max((count for count in requested if count is not None), default=None)
    if needed is None:
        most = max(1, min(most, len(gpus)))
        needed = min(len(gpus) // most, cluster.tasks_per_node or len(gpus))
        cluster = cluster.model_copy(update={"gpus_per_node": needed})
    if needed == 0:
        return [Lane(cluster)] * max(1, min(cluster.max_parallel, num_streams))
    if needed > len(gpus):
        raise ConfigError(
            f"cluster file: gpus_per_node={needed}: {len(gpus)} GPUs are visible on this machine; request no more, or "
            "leave it out to use those that are there"
        )
    most = min(most, len(gpus) // needed)
    return [Lane(cluster, tuple(gpus[lane * needed : (lane + 1) * needed])) for lane in range(most)]


def gpu_assignment(gpus: Sequence[str], count: int, outer: str | None) -> str | None:
    """Return CUDA_VISIBLE_DEVICES for a job of `count` of these GPUs; None for no such variable.

    `outer`: its value around the job. A job without GPUs does not see those that are there.
    """
    if count:
        return ",".join(gpus[:count])
    return "" if gpus else outer
