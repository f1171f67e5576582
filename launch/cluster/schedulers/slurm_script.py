"""Options and script of a SLURM job, from a cluster file.

Pure: it runs no command of SLURM and writes nothing.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avcil_dist.exit_codes import USER_ERROR
from launch.cluster.container import python_words, single_python_words, srun_words
from launch.cluster.guarded_setup import guarded_setup
from launch.cluster.resources import ClusterConfig

WAIT_SECONDS = 3600  # rank 0 uploads results after the others have ended; a rank that still runs then is lost
REQUEUE_SECONDS = 600  # longest wait for SLURM to end a job that it has requeued
RETRY_SECONDS, RETRIES = 5, 120  # pause after a call that SLURM did not answer, and number of calls
NO_OPTIONS = ("setup", "teardown", "srun_args", "stderr_to_stdout", "signal_delay_s", "additional_parameters")
LATE_SHARE = 4  # ranks have all but this part of the time between warning and limit for their snapshot


def sbatch_parameters(
    cluster: ClusterConfig,
    step: int,
    *,
    name: str,
    code: str | None,
    prefix: str,
    python: str,
    dependency: str | None,
) -> dict[str, Any]:
    """Return the parameters of submitit's SLURM executor for a step's job.

    `code`: the folder that comes first on Python's path. `prefix`: the path of the step's status files without
    their ending. `python`: the interpreter of the submission. `dependency`: in the syntax of sbatch.
    """
    resources = cluster.at(step)
    folders = job_folders(str(Path(prefix).parent))
    end_python = single_python_words(resources, folders, python)
    parameters = {
        "job_name": name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "time": math.ceil(resources.hours * 60),
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": f"{math.ceil(resources.memory_gb * 1024)}MB" if resources.memory_gb else None,
        "dependency": dependency,
        "signal_delay_s": resources.signal_seconds,
        "setup": _setup(resources, code, step, _not_done(step, prefix, resources.max_requeues, end_python)),
        "teardown": ["code=$?", "exec {waiting}>&-", 'not_done "exit code $code"'],
        "srun_args": [
            "--export=ALL",  # the script's environment, whatever `export` or SLURM_EXPORT_ENV the job has
            f"--cpus-per-task={resources.cpus_per_task}",  # srun does not take it from the job
            "--kill-on-bad-exit=1",
            f"--wait={WAIT_SECONDS}",
            *srun_words(resources, folders),
        ],
        "stderr_to_stdout": True,
        "additional_parameters": {
            "kill-on-invalid-dep": "yes",
            "requeue": True,
            "signal": f"USR2@{resources.signal_seconds}",  # of all signals, ranks handle this one and SIGTERM
            **{key.replace("_", "-"): value for key, value in resources.extra.items() if value is not False},
        },
    }
    return {key: value for key, value in parameters.items() if value is not None}


def sbatch_options(parameters: dict[str, Any]) -> dict[str, str]:
    """Return the options of sbatch among these parameters, by name; a flag's value is an empty string."""
    given = parameters | parameters["additional_parameters"]
    values = {key.replace("_", "-"): value for key, value in given.items() if key not in NO_OPTIONS}
    return {key: "" if value is True else str(value) for key, value in values.items()}


def job_folders(chain_folder: str) -> list[Path]:
    """Return the folders of each container: that which holds the chain's, of the stream or of the cluster file."""
    return [Path(chain_folder).parent]


def rank_command(cluster: ClusterConfig, python: str, chain_folder: str, folder: str, ranks: str) -> str:
    """Return the command of a rank; `ranks` is the file in `folder` with the pickled ranks."""
    words = python_words(cluster, job_folders(chain_folder), python)
    return shlex.join([*words, "-u", "-m", "launch.cluster.rank_main", folder, ranks])


def sbatch_text(parameters: dict[str, Any], *, folder: str, command: str) -> str:
    """Return the script for sbatch. `folder`: of its logs. `command`: of a rank."""
    from submitit.slurm.slurm import _make_sbatch_string  # used by submitit's executor, which would also need srun

    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def _setup(cluster: ClusterConfig, code: str | None, step: int, end: Sequence[str]) -> list[str]:
    """Shell lines before the ranks start; `late` requeues a job whose ranks ignore SLURM's warning.

    `end`: the lines that define `not_done`. At its time limit SLURM ends a job for good, and cancels the jobs that wait
    for it; until then it can be requeued. The end of its input, not a signal, ends `late`: bash can lose a signal
    between a command and the next.
    """
    late_seconds = math.ceil(cluster.signal_seconds / LATE_SHARE)
    paths = ["export PYTHONSAFEPATH=1  # no modules of the working folder"]
    if code:
        paths.append(f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}")
    return [
        f"pause={RETRY_SECONDS}",
        "requeue() {",
        '  if [ "${reason:-}" != "$1" ]; then  # the first of several calls',
        f'    echo "avcil: step {step} is not done ($1); requeued, it continues from its last snapshot"; reason=$1',
        "  fi",
        f'  if scontrol requeue "$SLURM_JOB_ID"; then sleep {REQUEUE_SECONDS}; exit 1; fi',
        "}",
        *end,
        *guarded_setup(cluster.setup, [*paths, 'not_done "setup: exit code $code"']),
        "trap : TERM USR2  # the ranks handle these signals; the shell waits for the ranks",
        *paths,
        "late() {",
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {cluster.max_requeues} ]; then exit; fi',
        "  export SLURM_TIME_FORMAT=standard",
        "  while true; do",
        "    left=$pause",
        '    if end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e); then',
        '      if [ -z "$end" ] || ! end=$(date --date="$end" +%s); then exit; fi',
        f"      left=$((end - {late_seconds} - $(date +%s)))",
        '      if [ "$left" -le 0 ]; then',
        '        requeue "the ranks do not react, and the time limit is near"',
        "        left=$pause",
        "      fi",
        "    fi",
        '    read -r -t "$left"  # a pause, which ends with the input',
        '    if [ "$?" -le 128 ]; then exit; fi',
        "  done",
        "}",
        "exec {waiting}> >(late)  # its input ends when this is closed, or with the script",
    ]


def _not_done(step: int, prefix: str, max_requeues: int, python: Sequence[str]) -> list[str]:
    """Shell lines that define `not_done REASON`, the end of a start: success, failure, or another start.

    srun's exit code is not enough: it is 0 where a node's daemon was lost. A job that SLURM itself is ending
    (cancelled, preempted, requeued by hand) is left to SLURM: its state is known, and no longer RUNNING. A busy
    controller does not answer every call, so both calls are repeated.
    """
    done, failed, folder = (
        shlex.quote(text) for text in (f"{prefix}.done", f"{prefix}.failed", str(Path(prefix).parent))
    )
    return [
        "not_done() {",
        f"  if [ -e {done} ]; then exit 0; fi",
        f"  if [ -e {failed} ]; then exit {USER_ERROR}; fi",
        '  cause="SLURM did not requeue the job"',
        f"  for _ in {{1..{RETRIES}}}; do",
        '    case "$(scontrol show job -o "$SLURM_JOB_ID")" in',
        '      *" JobState=RUNNING "*)',
        f'        if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then',
        f'          cause="max_requeues={max_requeues}"; break',
        "        fi",
        '        requeue "$1" ;;',
        '      *" JobState="*) exit 1 ;;',
        "    esac",
        '    sleep "$pause"',
        "  done",
        f"  {shlex.join(python)} -m launch.cluster.mark_failed {folder} {step} \\",
        f'    "step {step} is not done after $((${{SLURM_RESTART_COUNT:-0}} + 1)) starts ($1; $cause); see its log"',
        "  exit 1",
        "}",
    ]
