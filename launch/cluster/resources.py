"""Cluster file: a scheduler, and the resources that each step's job requests from it.

Its values become lines of a job script, each an option of sbatch: a pattern describes every one of them. Only `setup`
is shell text, as it stands.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, StringConstraints, field_validator, model_validator

from avcil_dist.config.loader import find_in_path, is_file, load_settings, names_in_path
from avcil_dist.config.section import PathText, Section, ShellLines
from avcil_dist.errors import ConfigError
from avcil_dist.system.plugins import trust

START_SECONDS = 30  # a job that is warned before it has started to train continues from nothing, again and again
# Options of sbatch that a job script sets itself, and the setting of a cluster file for those that have one.
OWN_OPTIONS: Mapping[str, str | None] = {
    "account": "account",
    "constraint": "constraint",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "mem": "memory_gb",
    "nodes": "nodes",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "partition": "partition",
    "qos": "qos",
    "signal": "signal_seconds",
    "time": "hours",
} | dict.fromkeys(
    [
        *("array", "chdir", "dependency", "error", "help", "input", "job-name", "kill-on-invalid-dep", "no-requeue"),
        *("open-mode", "output", "parsable", "quiet", "requeue", "test-only", "usage", "version", "wait", "wrap"),
    ]
)

# A name of SLURM, or several with commas between them; an expression of features; any text on one line. In a script,
# SLURM takes a backslash for a mark of its own.
Name = Annotated[str, StringConstraints(pattern=r"^[\w.@+][\w.,:@+-]*$")]
Features = Annotated[str, StringConstraints(pattern=r"^[\w.,:@+&|*!()\[\]= -]+$")]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f\\]*$")]
# An image: a path, or a name in a registry; and a folder of the host, with one of the container, and with its rights.
Image = Annotated[str, StringConstraints(pattern=r"^[\w./][\w./:@#+~=-]*$")]
Mount = Annotated[str, StringConstraints(pattern=r"^/[\w./@+~=-]*(:/[\w./@+~=-]*(:(ro|rw))?)?$")]
Gigabytes = Annotated[float, Field(gt=0, le=1e6)]
Hours = Annotated[float, Field(gt=0, le=100_000)]
OptionName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]


class StepResources(Section):
    """Resources that change from a step on; those left out stay as they are."""

    nodes: PositiveInt | None = None
    gpus_per_node: int | None = Field(None, ge=0)
    tasks_per_node: PositiveInt | None = None
    cpus_per_task: PositiveInt | None = None
    memory_gb: Gigabytes | None = None
    hours: Hours | None = None


class ClusterConfig(Section):
    """A cluster, and the resources of each step's job. One task is one rank."""

    kind: str = Field(description="scheduler: slurm, or local for this machine alone")
    nodes: PositiveInt = 1
    gpus_per_node: int | None = Field(
        None, ge=0, description="one task for each; default: none, with kind: local those of this machine"
    )
    tasks_per_node: PositiveInt | None = Field(None, description="tasks on a node without GPUs; default: 1")
    cpus_per_task: PositiveInt = Field(1, description="cores of a rank, for its decoding processes and threads")
    memory_gb: Gigabytes | None = Field(None, description="memory of a node")
    hours: Hours = Field(1.0, description="time limit of a step's job, which is requeued when it is reached")
    steps: dict[int, StepResources] = Field({}, description="other resources from that step on")
    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Features | None = None
    extra: dict[OptionName, Text | int | bool] = Field(
        {}, description="other options of sbatch, such as `exclude: node7`"
    )
    setup: Annotated[list[str], ShellLines] = Field(
        [], description="shell lines before the ranks start, such as `module load cuda`; they are executed as they are"
    )
    container: Image | None = Field(
        None, description="image that the ranks run in: a .sif or docker://… for Apptainer, a .sqsh or a name for Pyxis"
    )
    mounts: list[Mount] = Field(
        [],
        description="folders in the container, such as /data or /scratch/shards:/shards:ro",
    )
    python: PathText | None = Field(
        None, description="interpreter of the ranks; default: that of the submission, in a container `python`"
    )
    signal_seconds: PositiveInt = Field(120, description="time between the warning of a job and its time limit")
    max_requeues: int = Field(10, ge=0, description="restarts of a step's job before the step counts as failed")
    max_parallel: PositiveInt = Field(4, description="streams of a sweep that run at the same time")
    folder: PathText | None = Field(
        None, description="folder for code and logs on a disk that all nodes share; default: the stream's folder"
    )

    @field_validator("extra")
    @classmethod
    def _leave_own_options(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for key in extra:
            option = key.replace("_", "-")
            if option in OWN_OPTIONS:
                setting = OWN_OPTIONS[option]
                raise ValueError(f"{key}: avcil sets this option itself" + (f"; use {setting}" if setting else ""))
        return extra

    @model_validator(mode="after")
    def _leave_time_to_train(self) -> "ClusterConfig":
        for step in sorted({0, *self.steps}):
            hours = self.at(step).hours
            if hours * 3600 <= self.signal_seconds + START_SECONDS:
                raise ValueError(
                    f"hours={hours:g} is {hours * 3600:.0f} s: a job is warned signal_seconds={self.signal_seconds} s "
                    f"before its limit and needs {START_SECONDS} s to start; raise hours, or lower signal_seconds"
                )
        return self

    @model_validator(mode="after")
    def _mount_in_a_container(self) -> "ClusterConfig":
        if self.mounts and self.container is None:
            raise ValueError("mounts are those of a container; set container too, or leave mounts out")
        return self

    @model_validator(mode="after")
    def _one_task_for_each_gpu(self) -> "ClusterConfig":
        for step in sorted({0, *self.steps}):
            resources = self.at(step)
            if resources.gpus_per_node and resources.tasks_per_node not in (None, resources.gpus_per_node):
                raise ValueError(
                    f"tasks_per_node={resources.tasks_per_node} with gpus_per_node={resources.gpus_per_node}: "
                    "a task has one GPU; leave tasks_per_node out"
                )
        return self

    def at(self, step: int) -> "ClusterConfig":
        """Return the cluster with the resources of a step."""
        changes: dict[str, Any] = {}
        for first in sorted(self.steps):
            if first <= step:
                changes |= self.steps[first].model_dump(exclude_none=True)
        return self.model_copy(update=changes)

    @property
    def is_elsewhere(self) -> bool:
        """Whether jobs run on other machines than this one."""
        return self.kind != "local"

    @property
    def tasks(self) -> int:
        """Tasks of a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of a step's job."""
        return self.nodes * self.tasks


def load_cluster(name: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Load a cluster from a file or by its name, with `key=value` overrides. Raises ConfigError."""
    path = Path(name) if is_file(Path(name)) else find_in_path("cluster", name)
    if path is None:
        names = ", ".join(names_in_path("cluster"))
        raise ConfigError(f"--cluster {name}: no such file, and no cluster of that name (there are: {names})")
    cluster = load_settings(path, ClusterConfig, overrides)
    trust(cluster.kind)
    return cluster
