"""World of a process: its rank, local rank and world size, parsed from the environment of a launcher.

Pure functions of an environment given as a mapping. Nothing is started or connected.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class World:
    """Rank of one process. Ranks count from 0; `local_*` are within this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    launcher: str = "none"

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


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Return the world that torchrun or srun has set up, or a world of one process.

    Raises WorldError when only some of a launcher's variables are set: with guesses for the others, ranks would wait
    for each other without end.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_torchrun(environment)
    if "SLURM_STEP_ID" in environment:
        return _from_slurm(environment)
    return World()


def threads_per_rank(world: World, environment: Mapping[str, str], cores: int) -> int:
    """Number of threads for one rank, from the `cores` that its process may use.

    SLURM binds each task to its own `--cpus-per-task` cores; any other launcher lets the ranks of a machine share its
    cores. More threads than cores make all ranks slow.
    """
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
    return World(
        rank=_integer(environment, "RANK"),
        size=_integer(environment, "WORLD_SIZE"),
        local_rank=_integer(environment, "LOCAL_RANK"),
        local_size=_integer(environment, "LOCAL_WORLD_SIZE"),
        master_addr=environment["MASTER_ADDR"],
        master_port=_integer(environment, "MASTER_PORT"),
        launcher="torchrun",
    )


def _from_slurm(environment: Mapping[str, str]) -> World:
    _require(environment, (*SLURM_VARIABLES, "SLURM_JOB_ID"), "srun")
    job_id = _integer(environment, "SLURM_JOB_ID")
    return World(
        rank=_integer(environment, "SLURM_PROCID"),
        size=_integer(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_size=_tasks_of_node(environment),
        master_addr=first_host(environment["SLURM_STEP_NODELIST"]),
        master_port=FIRST_JOB_PORT + job_id % JOB_PORTS,
        launcher="slurm",
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
