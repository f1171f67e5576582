import hashlib

import pytest

from avcil_dist.errors import WorldError
from avcil_dist.world import (
    OPEN_MPI,
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
# `srun --pty bash`
INTERACTIVE = ONE_NODE | {
    "SLURM_PTY_PORT": "34567",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
ELASTIC = TORCHRUN | {
    "TORCHELASTIC_RUN_ID": "run7",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "3548119041",
}
JOB_START = "1234567.0/0"
NAMESPACE = hashlib.sha256(b"3548119041").hexdigest()
HYDRA_OF_TWO_NODES = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "MASTER_ADDR": "gpu03",
    "MASTER_PORT": "29500",
}


def _without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(0, 1, 0, 1, "127.0.0.1", 0, "none")),
        ({"PATH": "x", "MASTER_ADDR": "gpu07"}, World(0, 1, 0, 1, "127.0.0.1", 0, "none")),
        (TORCHRUN, World(5, 8, 1, 4, "gpu07", 29400, "torchrun")),
        (ONE_NODE, World(0, 2, 0, 2, "login-1", 24567, "slurm", start_id=JOB_START)),
        (SLURM, World(3, 4, 1, 2, "gpu03", 24567, "slurm", start_id=JOB_START)),
        (ALLOCATION, World(0, 1, 0, 1, "127.0.0.1", 0, "none")),
        (SLURM | ELASTIC, World(5, 8, 1, 4, "gpu07", 29400, "torchrun", "avcil/run7/2", "run7/2")),
        (SLURM | {"SLURM_STEP_ID": "4294967290"}, World()),
        (INTERACTIVE, World()),
        (ONE_NODE | {"SLURM_PTY_PORT": "34567"}, World(0, 2, 0, 2, "login-1", 24567, "slurm", start_id=JOB_START)),
        (MPIRUN, World(1, 2, 1, 2, "127.0.0.1", 22571, "mpirun", start_id=NAMESPACE)),
        (MPIRUN | {"MASTER_PORT": "29500"}, World(1, 2, 1, 2, "127.0.0.1", 29500, "mpirun", start_id=NAMESPACE)),
        (MPIRUN | dict.fromkeys(OPEN_MPI, "0") | {"OMPI_COMM_WORLD_SIZE": "1"}, World()),
        (MPIRUN | ELASTIC, World(5, 8, 1, 4, "gpu07", 29400, "torchrun", "avcil/run7/2", "run7/2")),
        (HYDRA_OF_TWO_NODES, World(3, 4, 1, 2, "gpu03", 29500, "mpirun")),
        (
            SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"},
            World(3, 4, 1, 2, "gpu03", 24567, "slurm", start_id=JOB_START),
        ),
    ],
    ids=[
        "nothing",
        "only-an-address",
        "torchrun",
        "one-node",
        "two-nodes",
        "allocation",
        "torchrun-in-a-step",
        "interactive-step-of-salloc",
        "interactive-step-of-srun",
        "step-started-in-an-interactive-step",
        "mpirun",
        "mpirun-with-a-port",
        "one-process-of-an-outer-mpirun",
        "torchrun-under-mpirun",
        "hydra",
        "srun-with-pmi",
    ],
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


@pytest.mark.parametrize(
    "environment",
    [
        _without(HYDRA_OF_TWO_NODES, "MASTER_ADDR"),
        _without(HYDRA_OF_TWO_NODES, "MASTER_PORT"),
        _without(MPIRUN, "PMIX_NAMESPACE"),
    ],
)
def test_mpirun_without_a_place_to_meet_states_how_to_start(environment: dict[str, str]) -> None:
    with pytest.raises(WorldError, match=r"set MASTER_ADDR .* and MASTER_PORT .* or start with torchrun or srun"):
        world_from_environment(environment)


def test_one_start_of_mpirun_has_one_port_and_the_next_start_another() -> None:
    ports = [world_from_environment(MPIRUN | {"PMIX_NAMESPACE": name}).master_port for name in ("a", "a", "b")]
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ONE_NODE | MPIRUN, r"slurm started rank 0 of 2, and OMPI_COMM_WORLD_\* set rank 1 of 2; unset"),
        (SLURM | TORCHRUN, "slurm started rank 3 of 4, and RANK and WORLD_SIZE set rank 5 of 8; unset RANK and WORLD_"),
    ],
)
def test_launchers_that_contradict_each_other_are_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        world_from_environment(environment)


def test_variables_that_repeat_those_of_srun_are_no_contradiction() -> None:
    same = TORCHRUN | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert world_from_environment(SLURM | same) == World(3, 4, 1, 2, "gpu07", 29400, "torchrun")


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_that_cannot_be_is_refused(port: str) -> None:
    with pytest.raises(WorldError, match=f"MASTER_PORT={port} is no port"):
        world_from_environment(TORCHRUN | {"MASTER_PORT": port})


def test_ranks_of_one_machine_meet_on_the_loopback_interface() -> None:
    assert world_from_environment(ONE_NODE).meeting_host == "127.0.0.1"
    assert world_from_environment(SLURM).meeting_host == "gpu03"


def test_each_meeting_has_a_port_of_its_own() -> None:
    world = world_from_environment(TORCHRUN | {"MASTER_PORT": "65530"})
    ports = [world.at_meeting(number).master_port for number in range(100)]
    assert len(set(ports)) == 100
    assert all(1024 <= port < 65536 for port in ports)
    assert world.at_meeting(0).master_port == 65531


def test_each_meeting_has_a_key_of_its_own_in_the_store_of_torchrun() -> None:
    world = world_from_environment(ELASTIC)
    assert world.at_meeting(3) == World(5, 8, 1, 4, "gpu07", 29400, "torchrun", "avcil/run7/2/3", "run7/2")


def test_a_restarted_job_and_another_step_of_a_job_have_other_ports_and_names() -> None:
    changes: list[dict[str, str]] = [
        {},
        {"SLURM_RESTART_COUNT": "1"},
        {"SLURM_RESTART_COUNT": "2"},
        {"SLURM_STEP_ID": "1"},
    ]
    worlds = [world_from_environment(SLURM | change) for change in changes]
    assert len({world.master_port for world in worlds}) == len({world.start_id for world in worlds}) == 4


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
        ("local", {"OMP_NUM_THREADS": "1"}, 64, 1),
        ("local", {"OMP_NUM_THREADS": "6,2"}, 64, 6),
        ("local", {"OMP_NUM_THREADS": "many"}, 64, 16),
        ("local", {"OMP_NUM_THREADS": "0"}, 64, 16),
        ("slurm", {"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "8"}, 8, 3),
    ],
)
def test_threads_come_from_the_cores_that_a_rank_may_use(
    launcher: str, environment: dict[str, str], cores: int, threads: int
) -> None:
    world = World(rank=1, size=8, local_rank=1, local_size=4, launcher=launcher)
    assert threads_per_rank(world, environment, cores) == threads
