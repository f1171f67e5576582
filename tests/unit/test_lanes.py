"""GPUs of the lanes of a machine, on tables of machines and cluster files."""

from typing import Any

import pytest

from avcil_dist.errors import ConfigError
from launch.cluster.lanes import gpu_assignment, machine_lanes, visible_gpus
from launch.cluster.resources import ClusterConfig, load_cluster

EIGHT = tuple("01234567")


def cluster(**settings: Any) -> ClusterConfig:
    return ClusterConfig(kind="local", **settings)


@pytest.mark.parametrize(
    ("settings", "gpus", "streams", "lanes"),
    [
        ({}, EIGHT, 1, ["01234567"]),
        ({}, EIGHT, 20, ["01", "23", "45", "67"]),  # max_parallel is 4
        ({"max_parallel": 8}, EIGHT, 20, list(EIGHT)),
        ({"max_parallel": 20}, EIGHT, 20, list(EIGHT)),
        ({"max_parallel": 3}, EIGHT, 20, ["01", "23", "45"]),
        ({"max_parallel": 8}, EIGHT, 2, ["0123", "4567"]),
        ({"gpus_per_node": 1}, EIGHT, 20, ["0", "1", "2", "3"]),
        ({"gpus_per_node": 4}, EIGHT, 20, ["0123", "4567"]),
        ({"gpus_per_node": 1, "steps": {2: {"gpus_per_node": 4}}}, EIGHT, 20, ["0123", "4567"]),
        ({"tasks_per_node": 1}, EIGHT, 1, ["0"]),
        ({}, ("7",), 20, ["7"]),
        ({}, ("GPU-a", "GPU-b"), 2, ["GPU-a", "GPU-b"]),
        ({}, (), 20, [""] * 4),
        ({"gpus_per_node": 0, "max_parallel": 3}, EIGHT, 20, [""] * 3),
    ],
)
def test_each_lane_has_gpus_of_its_own(
    settings: dict[str, Any], gpus: tuple[str, ...], streams: int, lanes: list[str]
) -> None:
    found = machine_lanes(cluster(**settings), gpus, streams)
    assert ["".join(lane.gpus) for lane in found] == lanes
    assert all(lane.cluster.at(9).gpus_per_node == len(lane.gpus) for lane in found)
    assert all(lane.cluster.tasks == max(1, lane.cluster.gpus_per_node or 0) for lane in found)


def test_without_gpus_the_tasks_are_those_of_the_cluster_file() -> None:
    [lane] = machine_lanes(cluster(tasks_per_node=3), (), 1)
    assert lane.cluster.world_size == 3
    assert machine_lanes(load_cluster("local"), EIGHT, 1)[0].cluster.world_size == 8
    assert machine_lanes(load_cluster("local"), (), 1)[0].cluster.world_size == 1


def test_more_gpus_than_the_machine_has_are_an_error() -> None:
    with pytest.raises(ConfigError, match="gpus_per_node=4: 2 GPUs are visible on this machine"):
        machine_lanes(cluster(gpus_per_node=4), ("0", "1"), 1)


@pytest.mark.parametrize(
    ("count", "environment", "names"),
    [
        (3, {}, ("0", "1", "2")),
        (2, {"CUDA_VISIBLE_DEVICES": "5, 7"}, ("5", "7")),
        (1, {"CUDA_VISIBLE_DEVICES": "GPU-1f,99"}, ("GPU-1f",)),
        (0, {"CUDA_VISIBLE_DEVICES": ""}, ()),
        (0, {}, ()),
    ],
)
def test_gpus_are_named_as_the_environment_lists_them(
    count: int, environment: dict[str, str], names: tuple[str, ...]
) -> None:
    assert visible_gpus(count, environment) == names


def test_a_job_sees_its_gpus_alone_and_without_any_nothing_is_hidden() -> None:
    assert gpu_assignment(("5", "7"), 1, "5,7") == "5"
    assert gpu_assignment(("5", "7"), 0, None) == ""
    assert gpu_assignment((), 0, None) is None
    assert gpu_assignment((), 0, "") == ""
