"""Submission to a real SLURM as users meet it: from inside a job, with their profiles and names, and interrupted."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from avcil_dist.world import world_from_environment
from launch.sandbox.cluster import Sandbox
from tests.helpers.chains import SECONDS, job_of, no_job_starts, wait_for, wait_for_end, wait_for_restart
from tests.helpers.documents import PROJECT, blocks, commands
from tests.helpers.streams import avcil, write_config

TWO_NODES = ("--cluster", "slurm", "cluster.nodes=2", "cluster.cpus_per_task=1", "cluster.memory_gb=0.5")
# What people have in their profiles, and what jobs and launchers set around a command.
PROFILE = {
    "SBATCH_JOB_NAME": "mine",
    "SBATCH_OUTPUT": "/dev/null",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_SIGNAL": "HUP@10",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "0",
    "SQUEUE_STATES": "RUNNING",
    "SQUEUE_FORMAT": "%i",
    "OMPI_COMM_WORLD_RANK": "0",
    "PMIX_RANK": "0",
    "RANK": "0",
    "WORLD_SIZE": "1",
}
KILLING_SBATCH = """#!/bin/sh
{sbatch} "$@" > /dev/null
kill -KILL $PPID
"""


def submission(config: Path, *outer: str, path: str | None = None) -> "subprocess.Popen[str]":
    """Start `avcil submit` as a command, within `outer`, with the profile above."""
    variables = PROFILE | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    profile = ["env", *(f"{name}={value}" for name, value in variables.items())]
    command = [*outer, *profile, sys.executable, "-m", "avcil_dist", "submit", str(config), *TWO_NODES]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def queued(sandbox: Sandbox) -> list[str]:
    """Return the names of all jobs that wait or run, without that of salloc."""
    names = sandbox.run("squeue", "--noheader", "--format=%j").stdout.split()
    return sorted(name for name in names if name.startswith("s0"))


def port_of(job: str) -> int:
    """Return the port of the ranks in the first start of a job."""
    step = {"STEP_ID": "0", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "STEP_NUM_TASKS": "2"}
    step |= {"STEP_TASKS_PER_NODE": "1(x2)", "STEP_NODELIST": "x[1-2]", "JOB_ID": job}
    return world_from_environment({f"SLURM_{name}": value for name, value in step.items()}).master_port


def test_a_chain_is_submitted_once_from_inside_a_job_whatever_its_environment_and_names(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    output = tmp_path / 'it\'s a "run" #1 ~x$HOME é'
    config = write_config(tmp_path, output=str(output))
    stream = str(output / "tiny-avcil-seed0")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(KILLING_SBATCH.format(sbatch=shutil.which("sbatch")))
    (programs / "sbatch").chmod(0o755)

    # Within the allocation of a heterogeneous job with memory for each processor; at first right after the first job.
    salloc = (
        "salloc",
        "-Q",
        "-p",
        "nowarn",
        "-n1",
        "--mem-per-cpu=100",
        ":",
        "-p",
        "nowarn",
        "-n1",
        "--mem-per-cpu=50",
    )
    with no_job_starts(sandbox):
        submission(config, *salloc, path=str(programs)).communicate(timeout=SECONDS)
        assert not Path(stream, "jobs.json").exists()
        [first] = queued(sandbox)
        both = [submission(config, *salloc), submission(config)]
        outputs = [process.communicate(timeout=SECONDS)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert sorted(output.count("waits or runs already") for output in outputs) == [1, 3]
        assert queued(sandbox) == [first, *(first.replace("s00-", f"s{step:02d}-") for step in (1, 2))]
        port = socket.create_server(("", port_of(job_of(stream, 0))))  # a foreign program has the port of the job

    wait_for_restart(sandbox, job_of(stream, 0), 1)  # it takes another port
    port.close()
    assert "is in use on" in avcil("logs", stream, "--step", 0).output
    assert [step.state for step in wait_for_end(stream)] == ["COMMITTED"] * 3
    log = avcil("logs", stream, "--step", 2).output
    assert "epoch 12/12" in log
    for noise in ("kill: usage", "Terminated", "No such file"):
        assert noise not in log


def submit_lines() -> list[list[str]]:
    """Return the words of each `avcil submit` in the documents that needs nothing but the shards built before."""
    found = [
        words
        for name in ("README.md", "docs/clusters.md")
        for block in blocks(PROJECT / name)
        if block.language == "bash"
        for words in commands(block.text)
        if words[:2] == ["avcil", "submit"] and "data.manifest=shards/manifest.json" in words
    ]
    assert len(found) == 3
    return found


def test_the_submit_lines_of_the_documents_work_as_written(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ("--train", 8, "--val", 1, "--test", 1, "--seconds", 0.5, "--size", 32)
    for words in (("synth", "clips", *sizes), ("build", "clips/clips.csv", "shards")):
        result = avcil("shards", *words)
        assert result.exit_code == 0, result.output
    with no_job_starts(sandbox):
        for words in submit_lines():
            wait_for(lambda: not queued(sandbox), "the end of earlier jobs")  # committed, and still completing
            result = avcil(*words[1:], "--dry-run")
            assert result.output.startswith("#!/bin/bash\n"), result.output
            result = avcil(*words[1:])
            assert result.exit_code == 0, result.output
            assert [name[:8] for name in queued(sandbox)] == ["s00-demo", "s01-demo", "s02-demo", "s03-demo"]
            assert "PENDING" in avcil("status", "runs").output
            assert "4 ended" in avcil("cancel", "runs").output
