"""Scripts of a build by parts on SLURM: an array with a task for each part, and the merge. Pure: nothing is written."""

import math
import shlex
import sys
from pathlib import Path

from launch.cluster.container import python_words, single_python_words, srun_words
from launch.cluster.guarded_setup import guarded_setup
from launch.cluster.part_jobs import MERGE, PROGRAM, PartJobs
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.slurm_script import REQUEUE_SECONDS, RETRY_SECONDS

TASK = "NUMBER_OF_THE_TASK"  # its place in a command that is quoted for the shell


def array_text(cluster: ClusterConfig, work: PartJobs) -> str:
    """Return the script of the array."""
    options = _options(cluster, work) | {"array": f"1-{work.count}", "output": f"{work.folder}/part_%a.log"}
    command = shlex.join([*_python(cluster, work), *work.command_of(f"{TASK}/{work.count}")])
    command = command.replace(TASK, '"$SLURM_ARRAY_TASK_ID"')
    return _text(cluster, work, options, command, "part_${SLURM_ARRAY_TASK_ID}")


def merge_text(cluster: ClusterConfig, work: PartJobs, array: str) -> str:
    """Return the script of the merge, which starts after all tasks of the job `array` have succeeded."""
    options = _options(cluster, work) | {
        "output": f"{work.folder}/{MERGE}.log",
        "dependency": f"afterok:{array}",
        "kill-on-invalid-dep": "yes",
    }
    return _text(
        cluster,
        work,
        options,
        shlex.join([*single_python_words(cluster, _folders(work), sys.executable), "-m", PROGRAM, *work.merge]),
        MERGE,
    )


def option_names(cluster: ClusterConfig, work: PartJobs) -> list[str]:
    """Return the names of the options that the scripts set."""
    return [*_options(cluster, work), "array", "output", "dependency"]


def _options(cluster: ClusterConfig, work: PartJobs) -> dict[str, str]:
    tasks = work.ranks
    values = {
        "job-name": f"avcil-{work.command[1]}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": math.ceil(cluster.hours * 60),
        "nodes": cluster.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cluster.cpus_per_task * (cluster.tasks // tasks),
        "gpus-per-node": cluster.gpus_per_node or None,
        "mem": f"{math.ceil(cluster.memory_gb * 1024)}MB" if cluster.memory_gb else None,
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR2@{cluster.signal_seconds}",
        **{key.replace("_", "-"): value for key, value in cluster.extra.items()},
    }
    given = {key: value for key, value in values.items() if value is not None and value is not False}
    return {key: "" if value is True else str(value) for key, value in given.items()}


def _python(cluster: ClusterConfig, work: PartJobs) -> list[str]:
    folders = _folders(work)
    if work.ranks == cluster.nodes == 1:
        return [*single_python_words(cluster, folders, sys.executable), "-m", PROGRAM]
    srun = ["srun", "--export=ALL", f"--cpus-per-task={cluster.cpus_per_task}", "--kill-on-bad-exit=1"]
    return [*srun, *srun_words(cluster, folders), *python_words(cluster, folders, sys.executable), "-m", PROGRAM]


def _folders(work: PartJobs) -> list[Path]:
    return [Path(folder) for folder in (work.folder, work.working, work.code) if folder]


def _text(cluster: ClusterConfig, work: PartJobs, options: dict[str, str], command: str, name: str) -> str:
    """A script that requeues its task before the time limit: finished shards are not made again."""
    path = f"export PYTHONPATH={shlex.quote(work.code)}${{PYTHONPATH:+:$PYTHONPATH}}" if work.code else ""
    write_code = f'echo "$code" > {shlex.quote(work.folder)}/{name}.code'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}" for key, value in options.items()),
        "",
        *guarded_setup(cluster.setup, [write_code]),
        "export PYTHONSAFEPATH=1  # no modules of the working folder",
        *([path] if path else []),
        f"cd {shlex.quote(work.working)} || exit 1",
        f"pause={RETRY_SECONDS}",
        "again() {",
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {cluster.max_requeues} ]; then return; fi',
        '  echo "the time limit is near; requeued, it continues with the shards that are not done"',
        '  while kill -0 "$run" 2>/dev/null; do  # a busy controller does not answer every call',
        f'    if scontrol requeue "$SLURM_JOB_ID"; then sleep {REQUEUE_SECONDS}; exit 1; fi',
        '    sleep "$pause"',
        "  done",
        "}",
        "trap again USR2",
        f"{command} & run=$!",
        'wait "$run"; code=$?',
        'while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done  # a signal ends `wait`',
        write_code,
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
