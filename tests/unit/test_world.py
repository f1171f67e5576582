import pytest

from avcil_dist.errors import WorldError
from avcil_dist.world import (
    SLURM_VARIABLES,
    TORCHRUN_VARIABLES,
    World,
    first_host,
    threads_per_rank,
    world_from_environment,
)

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29400",
}
# what srun gives the second task of the second node
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_NODEID": "1",
}
ONE_NODE = SLURM | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "login-1",
    "SLURM_NODEID": "0",
}
# the shell that salloc opens, and the script of sbatch: an allocation, no step of it
ALLOCATION = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def _without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(0, 1, 0, 1, "127.0.0.1", 0, "none")),
        ({"PATH": "x", "MASTER_ADDR": "gpu07"}, World(0, 1, 0, 1, "127.0.0.1", 0, "none")),
        (TORCHRUN, World(5, 8, 1, 4, "gpu07", 29400, "torchrun")),
        (ONE_NODE, World(0, 2, 0, 2, "login-1", 24567, "slurm")),
        (SLURM, World(3, 4, 1, 2, "gpu03", 24567, "slurm")),
        (ALLOCATION, World(0, 1, 0, 1, "127.0.0.1", 0, "none")),
        (SLURM | TORCHRUN, World(5, 8, 1, 4, "gpu07", 29400, "torchrun")),
    ],
    ids=["nothing", "only-an-address", "torchrun", "one-node", "two-nodes", "allocation", "torchrun-in-a-step"],
)
def test_the_world_is_read_from_the_environment(environment: dict[str, str], world: World) -> None:
    assert world_from_environment(environment) == world


def test_only_rank_zero_is_main() -> None:
    assert world_from_environment(ONE_NODE).is_main
    assert not world_from_environment(SLURM).is_main
    assert World().is_main


@pytest.mark.parametrize(("node", "local_size"), [("0", 3), ("1", 3), ("2", 1)])
def test_uneven_nodes_have_their_own_number_of_tasks(node: str, local_size: int) -> None:
    environment = SLURM | {
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
        "SLURM_STEP_NODELIST": "gpu[03-05]",
        "SLURM_NODEID": node,
        "SLURM_LOCALID": "0",
    }
    assert world_from_environment(environment).local_size == local_size


def test_a_node_that_the_task_list_does_not_reach_is_an_error() -> None:
    with pytest.raises(WorldError, match="SLURM_NODEID=2 is not in"):
        world_from_environment(SLURM | {"SLURM_NODEID": "2"})


def test_jobs_that_share_a_node_have_ports_of_their_own() -> None:
    ports = {world_from_environment(SLURM | {"SLURM_JOB_ID": str(job)}).master_port for job in range(100, 150)}
    assert len(ports) == 50
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize("name", TORCHRUN_VARIABLES)
def test_an_incomplete_torchrun_environment_is_an_error(name: str) -> None:
    with pytest.raises(WorldError, match=f"incomplete: torchrun also sets {name};"):
        world_from_environment(_without(TORCHRUN, name))


@pytest.mark.parametrize("name", [*SLURM_VARIABLES, "SLURM_JOB_ID"])
def test_an_incomplete_slurm_environment_is_an_error(name: str) -> None:
    with pytest.raises(WorldError, match=f"incomplete: srun also sets {name};"):
        world_from_environment(_without(SLURM, name))


def test_a_rank_alone_names_all_that_is_missing() -> None:
    with pytest.raises(WorldError) as caught:
        world_from_environment({"RANK": "0"})
    assert "LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_a_torchrun_value_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(WorldError, match=f"{name}='{value}' is not"):
        world_from_environment(TORCHRUN | {name: value})


@pytest.mark.parametrize(
    "name",
    [
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
        "SLURM_JOB_ID",
    ],
)
@pytest.mark.parametrize("value", ["", "two"])
def test_a_slurm_value_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(WorldError, match=f"{name}='{value}' is not"):
        world_from_environment(SLURM | {name: value})


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("login", "login"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[03-07,9],x1", "gpu03"),
        ("gpu[9,11]", "gpu9"),
        ("x1,gpu[03-07]", "x1"),
        ("node-a.cluster[001-010]", "node-a.cluster001"),
        ("rack[2-3]n[07-09]", "rack2n07"),
        ("gpu[03-07]-ib,x1", "gpu03-ib"),
    ],
)
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", ",gpu1"])
def test_a_node_list_without_a_host_is_an_error(node_list: str) -> None:
    with pytest.raises(WorldError, match="no host name in it"):
        first_host(node_list)


@pytest.mark.parametrize("wrong", [{"RANK": "9"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "8"}])
def test_a_rank_that_cannot_be_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(WorldError, match="no such rank"):
        world_from_environment(TORCHRUN | wrong)


@pytest.mark.parametrize(
    ("launcher", "environment", "cores", "threads"),
    [
        ("torchrun", {}, 16, 4),
        ("torchrun", {}, 2, 1),  # a machine of 64 cores of which two are allowed
        ("torchrun", {"SLURM_CPUS_PER_TASK": "16"}, 16, 4),  # torchrun in a SLURM task: the ranks share its cores
        ("slurm", {"SLURM_CPUS_PER_TASK": "8"}, 8, 8),  # a task bound to its own cores
        ("slurm", {"SLURM_CPUS_PER_TASK": "8"}, 64, 8),  # no binding: the node's cores are visible
        ("slurm", {"SLURM_CPUS_PER_TASK": "8"}, 1, 1),
        ("slurm", {}, 64, 16),
    ],
)
def test_threads_come_from_the_cores_that_a_rank_may_use(
    launcher: str, environment: dict[str, str], cores: int, threads: int
) -> None:
    world = World(rank=1, size=8, local_rank=1, local_size=4, launcher=launcher)
    assert threads_per_rank(world, environment, cores) == threads
