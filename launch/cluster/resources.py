"""What a step is given of a cluster: from a cluster file to the parameters of submitit, and to the text of sbatch.

Pure: it asks no SLURM, and writes nothing.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from avcil_dist.config.loader import load_settings, shipped_configs
from avcil_dist.config.section import Section
from avcil_dist.errors import ConfigError
from avcil_dist.exit_codes import USER_ERROR

WAIT_SECONDS = 3600  # for rank 0 to upload its results; a rank that is still there so long after the first is lost
AGAIN_SECONDS = 600  # how long a job waits to be ended once it is requeued
LATE_SHARE = 4  # ranks have all but this part of the time between warning and limit for their snapshot


class StepResources(Section):
    """What changes from a step on; what is not said stays."""

    nodes: PositiveInt | None = None
    gpus_per_node: int | None = Field(None, ge=0)
    tasks_per_node: PositiveInt | None = None
    cpus_per_task: PositiveInt | None = None
    memory_gb: PositiveFloat | None = None
    hours: PositiveFloat | None = None


class ClusterConfig(Section):
    """A cluster, and what each step's job asks of it. One task is one rank."""

    kind: Literal["slurm", "local"] = Field(description="by SLURM, or on this machine")
    nodes: PositiveInt = 1
    gpus_per_node: int = Field(0, ge=0, description="one task for each")
    tasks_per_node: PositiveInt | None = Field(None, description="tasks of a node without GPUs; default: 1")
    cpus_per_task: PositiveInt = Field(1, description="processors of a rank: its decoding processes and threads")
    memory_gb: PositiveFloat | None = Field(None, description="of a node")
    hours: PositiveFloat = Field(1.0, description="time limit of a step's job; at its end the job is requeued")
    steps: dict[int, StepResources] = Field({}, description="resources from that step on")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    extra: dict[str, str | int | bool] = Field({}, description="other flags of sbatch, such as `exclude: node7`")
    setup: list[str] = Field([], description="shell lines before the ranks start, such as `module load cuda`")
    signal_seconds: PositiveInt = Field(120, description="a job is warned so long before its time is up")
    max_requeues: int = Field(10, ge=0, description="how often a step's job may begin again before it counts as failed")
    max_parallel: PositiveInt = Field(4, description="streams of a sweep at a time")
    folder: str | None = Field(
        None, description="folder on a disk that all nodes share, for code and logs; default: the stream's own"
    )

    @model_validator(mode="after")
    def _one_task_for_each_gpu(self) -> "ClusterConfig":
        for step in sorted({0, *self.steps}):
            found = self.at(step)
            if found.gpus_per_node and found.tasks_per_node not in (None, found.gpus_per_node):
                raise ValueError(
                    f"tasks_per_node={found.tasks_per_node} with gpus_per_node={found.gpus_per_node}: "
                    "a task has one GPU; leave tasks_per_node out"
                )
            if self.kind == "local" and found.nodes > 1:
                raise ValueError(f"nodes={found.nodes}: kind: local is this one machine; say tasks_per_node")
        return self

    def at(self, step: int) -> "ClusterConfig":
        """The resources of a step."""
        changes: dict[str, Any] = {}
        for first in sorted(self.steps):
            if first <= step:
                changes |= self.steps[first].model_dump(exclude_none=True)
        return self.model_copy(update=changes)

    @property
    def tasks(self) -> int:
        """Tasks of a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of a step's job."""
        return self.nodes * self.tasks


def load_cluster(name: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The cluster of a file or shipped name, with `key=value` overrides. Raises ConfigError."""
    shipped = shipped_configs() / "cluster"
    for path in (Path(name), shipped / f"{name}.yaml"):
        if path.is_file():
            return load_settings(path, ClusterConfig, overrides)
    names = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    raise ConfigError(f"--cluster {name}: no such file, and no shipped cluster of that name (there are: {names})")


def sbatch_parameters(
    cluster: ClusterConfig, step: int, *, name: str, code: str | None, mark: str, python: str, dependency: str | None
) -> dict[str, Any]:
    """The parameters of submitit's SLURM executor for a step's job.

    `code`: the folder that goes first on Python's path. `mark`: the path, without its ending, of the files that
    say how the step ended. `python`: the program. `dependency`: as sbatch takes it.
    """
    found = cluster.at(step)
    parameters = {
        "job_name": name,
        "partition": found.partition,
        "account": found.account,
        "qos": found.qos,
        "constraint": found.constraint,
        "time": math.ceil(found.hours * 60),
        "nodes": found.nodes,
        "ntasks_per_node": found.tasks,
        "cpus_per_task": found.cpus_per_task,
        "gpus_per_node": found.gpus_per_node or None,
        "mem": f"{math.ceil(found.memory_gb * 1024)}MB" if found.memory_gb else None,
        "dependency": dependency,
        "signal_delay_s": found.signal_seconds,
        "setup": _setup(found, code, step),
        "teardown": _teardown(step, mark, found.max_requeues, python),
        "srun_args": [  # srun does not take the number of processors from the job
            f"--cpus-per-task={found.cpus_per_task}",
            "--kill-on-bad-exit=1",
            f"--wait={WAIT_SECONDS}",
        ],
        "stderr_to_stdout": True,
        "additional_parameters": {"kill-on-invalid-dep": "yes", "requeue": True, **found.extra},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def sbatch_text(parameters: dict[str, Any], *, folder: str, python: str) -> str:
    """The script that submitit hands to sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string  # what its executor calls, without asking for an srun first

    command = f"{shlex.quote(python)} -u -m submitit.core._submit {shlex.quote(folder)}"
    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def _setup(cluster: ClusterConfig, code: str | None, step: int) -> list[str]:
    """Shell lines before the ranks; `late` ends ranks that do not answer SLURM's warning.

    At its time limit SLURM ends a job for good, and with it those that wait for it; until then it can be requeued.
    """
    late_seconds = math.ceil(cluster.signal_seconds / LATE_SHARE)
    lines = [
        *cluster.setup,
        "trap : TERM USR2  # signals are for the ranks; the shell waits for what they make of them",
        "export PYTHONSAFEPATH=1  # not the working folder's modules",
    ]
    if code:
        lines.append(f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}")
    return [
        *lines,
        "again() {",
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {cluster.max_requeues} ]; then return; fi',
        f'  echo "avcil: step {step} is not done ($1); requeued, it goes on from its last snapshot"',
        f'  if scontrol requeue "$SLURM_JOB_ID"; then sleep {AGAIN_SECONDS}; exit 1; fi',
        "}",
        "late() {",
        "  trap 'kill $!; exit' TERM",
        "  export SLURM_TIME_FORMAT=standard",
        '  while end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && [ -n "$end" ] \\',
        '      && end=$(date --date="$end" +%s); do',
        f"    left=$((end - {late_seconds} - $(date +%s)))",
        '    if [ "$left" -le 0 ]; then again "the ranks do not answer, and its time is up"; exit; fi',
        '    sleep "$left" & wait $!',
        "  done",
        "}",
        "late & late=$!",
    ]


def _teardown(step: int, mark: str, max_requeues: int, python: str) -> list[str]:
    """Shell lines that decide what the end of the ranks means.

    srun's exit code alone does not tell: it is 0 where a node's daemon was lost. A job that SLURM is ending
    itself (cancelled, preempted, requeued by hand) is left to SLURM: it is no longer in the state RUNNING.
    """
    done, failed, folder = (shlex.quote(text) for text in (f"{mark}.done", f"{mark}.failed", str(Path(mark).parent)))
    return [
        "code=$?",
        'kill "$late" 2>/dev/null',
        f"if [ -e {done} ]; then exit 0; fi",
        f"if [ -e {failed} ]; then exit {USER_ERROR}; fi",
        'if scontrol show job -o "$SLURM_JOB_ID" | grep -q " JobState=RUNNING "; then',
        '  again "exit code $code"',
        f'  starts="$((${{SLURM_RESTART_COUNT:-0}} + 1)) starts (exit code $code); max_requeues={max_requeues}"',
        f"  {shlex.quote(python)} -m launch.cluster.mark_failed {folder} {step} "
        f'"step {step} is not done after $starts; its log says more"',
        "fi",
        "exit 1",
    ]
