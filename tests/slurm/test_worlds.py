"""Worlds under a real srun: the bits of a plain run, in a step and in a job; an interactive shell is no rank."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sandbox.cluster import Sandbox
from tests.helpers.chains import wait_for_end
from tests.helpers.streams import avcil, weights_digest
from tests.helpers.surroundings import ONE_STEP, PROJECT, ReferenceRun, surroundings, trained_digest

SHOW_WORLD = (
    "import os; from avcil_dist.world import world_from_environment as read; world = read(os.environ); "
    "print('WORLD', world.launcher, world.rank, world.size)"
)


def test_a_step_of_srun_changes_no_bit(sandbox: Sandbox, reference: ReferenceRun, tmp_path: Path) -> None:
    step = ("srun", "--partition=low", "--ntasks=1")
    assert trained_digest(reference.config, tmp_path / "step", before=step) == reference.digest


def test_a_job_changes_no_bit(sandbox: Sandbox, reference: ReferenceRun, tmp_path: Path) -> None:
    words = (*ONE_STEP, f"output={tmp_path}/job", "--cluster", "slurm", "cluster.nodes=1", "cluster.cpus_per_task=1")
    result = avcil("submit", reference.config, *words)
    assert result.exit_code == 0, result.output
    stream = f"{tmp_path}/job/tiny-avcil-seed0"
    assert [step.state for step in wait_for_end(stream)] == ["COMMITTED"]
    assert weights_digest(stream, 0) == reference.digest


@pytest.mark.skipif(shutil.which("script") is None, reason="needs `script` for a terminal")
def test_an_interactive_shell_is_no_rank_and_a_step_started_in_it_is_a_world(sandbox: Sandbox) -> None:
    show = shlex.join([sys.executable, "-c", SHOW_WORLD])
    shell = shlex.join(["srun", "--ntasks=1", "--pty", "sh", "-c", f"{show}; srun --overlap --ntasks=2 {show}"])
    words = ["salloc", "-Q", "--partition=low", "--ntasks=2", "script", "-qec", shell, "/dev/null"]
    done = subprocess.run(
        words, cwd=PROJECT, env=surroundings({}), capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    worlds = sorted(re.findall(r"WORLD \w+ \d \d", done.stdout))  # a terminal may echo characters before them
    assert worlds == ["WORLD none 0 1", "WORLD slurm 0 2", "WORLD slurm 1 2"], done.stdout + done.stderr
