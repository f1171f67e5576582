"""World of a process: its rank, local rank and world size, parsed from the environment of a launcher.

Pure functions of an environment given as a mapping. Nothing is started or connected.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from avcil_dist.errors import WorldError

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)
FIRST_JOB_PORT, JOB_PORTS = 20000, 10000
STEP_STRIDE, RESTART_STRIDE = 101, 7919  # steps and restarts of a job have ports apart from those of its neighbours
FIRST_USER_PORT, LAST_PORT = 1024, 65535
LOOPBACK = "127.0.0.1"
FIRST_STEP_WITHOUT_RANKS = 4294967290  # salloc's interactive step; the ids above it are SLURM's own steps
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # mpirun of MPICH and Intel MPI
MPI_RUNS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid")  # name one start of mpirun


@dataclass(frozen=True)
class World:
    """Rank of one process. Ranks count from 0; `local_*` are within this machine.

    Rank 0 listens at `master_port`. If `agent_key` is set, a store of the launcher listens there instead: then rank 0
    chooses a free port, and the ranks agree on it under that key. `start_id` names the start of the ranks: all of them
    have the same one, and ranks of another start, which may come to the same port, have another one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = LOOPBACK
    master_port: int = 0
    launcher: str = "none"
    agent_key: str = ""
    start_id: str = ""

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise WorldError(
                f"{self.launcher} sets rank {self.rank} of {self.size}, "
                f"local rank {self.local_rank} of {self.local_size}: no such rank"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, writes and prints for all ranks."""
        return self.rank == 0

    @property
    def meeting_host(self) -> str:
        """The address at which rank 0 listens: the loopback interface if all ranks are on this machine."""
        return LOOPBACK if self.local_size == self.size else self.master_addr

    def at_meeting(self, number: int) -> "World":
        """Return the world for the ranks' meeting `number` under this launcher, counted from 0.

        Each meeting has a port or a key of its own: ranks that are ahead do not reach the meeting before.
        """
        if self.agent_key:
            return replace(self, agent_key=f"{self.agent_key}/{number}")
        ports = LAST_PORT + 1 - FIRST_USER_PORT  # the launcher itself may use the first one
        return replace(self, master_port=FIRST_USER_PORT + (self.master_port + 1 + number - FIRST_USER_PORT) % ports)


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Return the world that torchrun, srun or mpirun has set up, or a world of one process.

    An interactive shell that srun or salloc opened is no rank. Raises WorldError when only some of a launcher's
    variables are set, or when two launchers contradict each other: with guesses, ranks would wait for each other
    without end.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_torchrun(environment)
    if _is_step_of_ranks(environment):
        return _from_slurm(environment)
    for names in (OPEN_MPI, HYDRA):
        if _is_above_one(environment, names[1]):
            return _from_mpi(environment, names)
    return World()


def threads_per_rank(world: World, environment: Mapping[str, str], cores: int) -> int:
    """Number of threads for one rank: `OMP_NUM_THREADS`, or the rank's share of the `cores` its process may use.

    SLURM binds each task to its own `--cpus-per-task` cores; any other launcher lets the ranks of a machine share its
    cores. More threads than cores make all ranks slow.
    """
    if match := re.match(r"\s*0*([1-9]\d*)", environment.get("OMP_NUM_THREADS", "")):  # of `4,2` the outermost
        return int(match[1])
    if world.launcher == "slurm" and "SLURM_CPUS_PER_TASK" in environment:
        return max(1, min(cores, _integer(environment, "SLURM_CPUS_PER_TASK")))
    return max(1, cores // world.local_size)


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: `gpu03` of `gpu[03-07,9],x1`."""
    match = re.match(r"(?:[^\[,]|\[[^\]]*\])+", node_list)
    if not match:
        raise WorldError(f"SLURM_STEP_NODELIST={node_list!r}: no host name in it")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _from_torchrun(environment: Mapping[str, str]) -> World:
    _require(environment, TORCHRUN_VARIABLES, "torchrun")
    has_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    run, restart = environment.get("TORCHELASTIC_RUN_ID", ""), environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    world = World(
        rank=_integer(environment, "RANK"),
        size=_integer(environment, "WORLD_SIZE"),
        local_rank=_integer(environment, "LOCAL_RANK"),
        local_size=_integer(environment, "LOCAL_WORLD_SIZE"),
        master_addr=environment["MASTER_ADDR"],
        master_port=_port(environment),
        launcher="torchrun",
        start_id=f"{run}/{restart}" if run else "",
        agent_key=f"avcil/{run}/{restart}" if has_agent else "",
    )
    if not run and _is_step_of_ranks(environment) and _is_above_one(environment, "SLURM_STEP_NUM_TASKS"):
        _refuse_contradiction(world, "RANK and WORLD_SIZE", _from_slurm(environment))
    return world


def _from_slurm(environment: Mapping[str, str]) -> World:
    _require(environment, (*SLURM_VARIABLES, "SLURM_JOB_ID"), "srun")
    job_id, step_id = _integer(environment, "SLURM_JOB_ID"), _integer(environment, "SLURM_STEP_ID")
    # A program that has the port would have it at every start of the job: each start takes another one.
    restarts = _integer(environment, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
    world = World(
        rank=_integer(environment, "SLURM_PROCID"),
        size=_integer(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_size=_tasks_of_node(environment),
        master_addr=first_host(environment["SLURM_STEP_NODELIST"]),
        master_port=FIRST_JOB_PORT + (job_id + STEP_STRIDE * step_id + RESTART_STRIDE * restarts) % JOB_PORTS,
        launcher="slurm",
        start_id=f"{job_id}.{step_id}/{restarts}",
    )
    if _is_above_one(environment, OPEN_MPI[1]):
        _refuse_contradiction(_from_mpi(environment, OPEN_MPI), "OMPI_COMM_WORLD_*", world)
    return world


def _from_mpi(environment: Mapping[str, str], names: tuple[str, str, str, str]) -> World:
    """Return the world of mpirun, whose variables have these names. They hold no address at which ranks can meet."""
    _require(environment, names, "mpirun")
    rank, size, local_rank, local_size = (_integer(environment, name) for name in names)
    starts = [environment[name] for name in MPI_RUNS if environment.get(name)]
    is_placed = local_size == size or "MASTER_ADDR" in environment
    if not is_placed or not (starts or "MASTER_PORT" in environment):
        raise WorldError(
            f"mpirun started {size} ranks, but it sets no address at which they can meet; set MASTER_ADDR (the host of "
            "rank 0) and MASTER_PORT for all of them, or start with torchrun or srun"
        )
    digest = hashlib.sha256(starts[0].encode()).hexdigest() if starts else ""
    port = FIRST_JOB_PORT + int(digest, 16) % JOB_PORTS if starts else 0
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        master_addr=environment.get("MASTER_ADDR", LOOPBACK),
        master_port=_port(environment) if "MASTER_PORT" in environment else port,
        launcher="mpirun",
        start_id=digest,
    )


def _is_step_of_ranks(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as a rank, and not as an interactive shell.

    A shell's variables are inherited by the steps that are started in it: those have more tasks than one, or a shell
    of one task starts a single rank, which needs nothing of SLURM.
    """
    if "SLURM_STEP_ID" not in environment:
        return False
    if _integer(environment, "SLURM_STEP_ID") >= FIRST_STEP_WITHOUT_RANKS:
        return False
    return not ("SLURM_PTY_PORT" in environment and environment.get("SLURM_STEP_NUM_TASKS") == "1")


def _is_above_one(environment: Mapping[str, str], name: str) -> bool:
    return name in environment and _integer(environment, name) > 1


def _refuse_contradiction(world: World, names: str, other: World) -> None:
    if (world.rank, world.size) != (other.rank, other.size):
        raise WorldError(
            f"{other.launcher} started rank {other.rank} of {other.size}, and {names} set rank {world.rank} of "
            f"{world.size}; unset {names}, or start with one launcher"
        )


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of this node.

    SLURM lists `3(x2),1` for three tasks on each of two nodes and one on the third.
    """
    tasks = environment["SLURM_STEP_TASKS_PER_NODE"]
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE={tasks!r} is not a list of counts")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environment, "SLURM_NODEID")
    if node not in range(len(counts)):
        raise WorldError(f"SLURM_NODEID={node} is not in SLURM_STEP_TASKS_PER_NODE={tasks!r}")
    return counts[node]


def _require(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        raise WorldError(
            f"the environment is incomplete: {launcher} also sets {', '.join(missing)}; "
            f"start with {launcher}, or unset its remaining variables"
        )


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise WorldError(f"{name}={environment[name]!r} is not a whole number") from None


def _port(environment: Mapping[str, str]) -> int:
    port = _integer(environment, "MASTER_PORT")
    if not 1 <= port <= LAST_PORT:
        raise WorldError(f"MASTER_PORT={port} is no port; ports are 1 to {LAST_PORT}")
    return port
