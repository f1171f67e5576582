"""The program of a rank: it starts the pickle of its own submission, from folders that no other user can write."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from launch.cluster.rank_main import main


def run_rank(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run rank 0 of SLURM's job 7."""
    job = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    command = [sys.executable, "-m", "launch.cluster.rank_main", str(folder), *words]
    return subprocess.run(command, env=os.environ | job, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A step's folder with the pickles of two submissions."""
    path = tmp_path / "jobs 1" / "step_003"
    path.mkdir(parents=True)
    for part in (path.parent, path):
        part.chmod(0o700)
    for name in ("one", "two"):
        DelayedSubmission(print, name, "ran").dump(path / f"{name}.pkl")
    return path


@pytest.mark.slow
def test_a_rank_runs_the_pickle_of_its_submission_even_if_an_earlier_job_had_the_same_id(folder: Path) -> None:
    for name in ("one", "two"):
        done = run_rank(folder, f"{name}.pkl")
        assert done.returncode == 0, done.stderr
        assert f"{name} ran\n" in done.stdout
    assert (folder / "7_submitted.pkl").readlink() == Path("two.pkl")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("writable", ["jobs 1", "step_003"])
def test_no_pickle_is_loaded_from_a_folder_that_others_can_write(
    folder: Path, capsys: pytest.CaptureFixture[str], writable: str
) -> None:
    (folder if folder.name == writable else folder.parent).chmod(0o770)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with pytest.raises(SystemExit) as ended:
            main(str(folder), "one.pkl")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert ended.value.code == 2
    assert "others can write it" in capsys.readouterr().err
    assert "others can write it" in folder.with_suffix(".failed").read_text()  # the job is not started again
    assert not (folder / "7_submitted.pkl").exists()
