"""The shell, the folders and the launcher around a run: the same bits, or one line that says what to do."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.helpers.surroundings import PROJECT, ReferenceRun, as_user, command, surroundings, trained_digest

NOBODY = 65534
SHADOWS = ("launch", "data_shards", "torch", "queue", "deepspeed", "submitit")
STEP_OF_SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NODELIST": "localhost",
}


def fault_of(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line of a command that ended with a user error."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines[0].startswith("avcil: "), done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def run(words: list[str], folder: Path = PROJECT, **changes: str | None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, cwd=folder, env=surroundings(changes), capture_output=True, text=True, timeout=120, check=False
    )


def test_one_thread_and_assertions_off_change_no_bit(reference: ReferenceRun, tmp_path: Path) -> None:
    changes = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    assert trained_digest(reference.config, tmp_path / "out", options=["-OO"], changes=changes) == reference.digest


def test_another_user_without_a_home_changes_no_bit(reference: ReferenceRun, tmp_path: Path) -> None:
    starts_another = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import avcil_dist'], check=True)"
    nobody = as_user(NOBODY, tmp_path / "view")
    if os.geteuid() or not shutil.which("setpriv") or run([*nobody, sys.executable, "-c", starts_another]).returncode:
        pytest.skip("another user cannot be had here: it takes root, setpriv and mount namespaces")
    output, changes = reference.folder / "nobody", {"HOME": None, "XDG_CACHE_HOME": None}
    assert trained_digest(reference.config, output, before=nobody, changes=changes) == reference.digest
    assert next(output.rglob("COMMITTED.json")).stat().st_uid == NOBODY


def test_a_hostile_shell_and_working_folder_change_no_bit(reference: ReferenceRun, tmp_path: Path) -> None:
    """Modules of other programs, an empty entry of the path, warnings as errors, a long TMPDIR, an outer mpirun."""
    here = tmp_path / "here"
    here.mkdir()
    for name in SHADOWS:
        (here / f"{name}.py").write_text(f"open({str(tmp_path / f'imported_{name}')!r}, 'w')\n")
    long = tmp_path / ("x" * 100)
    long.mkdir()
    changes = {
        "PYTHONPATH": f"{PROJECT}:",
        "PYTHONWARNINGS": "error",
        "TMPDIR": str(long),
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "1",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_PTY_PORT": "34567",
        **STEP_OF_SRUN,
    }
    output = tmp_path / "out"
    words = ("--processes", "2")
    two = trained_digest(reference.config, output, *words, folder=here, changes=changes)
    assert two == trained_digest(reference.config, tmp_path / "plain", *words)
    assert not list(tmp_path.glob("imported_*"))


def test_workers_that_build_shards_have_room_for_their_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    (tmp_path / "torch.py").write_text("raise SystemExit('the working folder is on the path')\n")
    avcil = [sys.executable, "-m", "avcil_dist", "shards"]
    words = ["synth", "clips", "--classes", "2", "--train", "2", "--val", "1", "--test", "1"]
    for command_words in (words, ["build", "clips/clips.csv", "shards", "--processes", "2"]):
        done = run([*avcil, *command_words], tmp_path, TMPDIR=str(long), PYTHONPATH=f":{PROJECT}")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "shards" / "manifest.json").exists()
    assert not list(long.glob("pymp-*"))


@pytest.mark.parametrize("name", ["launch", "data_shards"])
def test_a_foreign_package_of_the_same_name_is_one_line(tmp_path: Path, name: str) -> None:
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    words = [sys.executable, "-m", "avcil_dist", "--version"]
    done = run(words, tmp_path.parent, PYTHONPATH=f"{tmp_path}:{PROJECT}")
    line = fault_of(done)
    assert line.startswith(f"avcil: {package} comes before the package '{name}' of avcil-dist on Python's path; remove")


def test_a_working_folder_that_was_removed_is_one_line(tmp_path: Path) -> None:
    script = 'cd "$1" && rmdir "$1" && exec "$2" -m avcil_dist train demo'
    done = run(["bash", "-c", script, "-", str(tmp_path), sys.executable])
    assert fault_of(done).startswith("avcil: the working folder was removed; change to another folder")


@pytest.mark.parametrize(
    ("words", "changes", "line"),
    [
        (("-n", "2"), {"GLOO_SOCKET_IFNAME": "ib0"}, "avcil: GLOO_SOCKET_IFNAME=ib0: this machine has lo"),
        ((), {"CUDA_VISIBLE_DEVICES": "99"}, "avcil: CUDA_VISIBLE_DEVICES=99, and torch sees no GPU: "),
        (
            ("-n", "2"),
            {**STEP_OF_SRUN, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"},
            "avcil: --processes 2: slurm started 4 ranks, and this is rank 0 of them; leave --processes out",
        ),
    ],
    ids=["interface", "gpu", "processes-under-srun"],
)
def test_what_cannot_be_as_requested_is_one_line(
    reference: ReferenceRun, tmp_path: Path, words: tuple[str, ...], changes: Mapping[str, str], line: str
) -> None:
    done = run(command(reference.config, tmp_path / "out", *words), **changes)
    assert fault_of(done).startswith(line)


def test_a_fork_server_that_dies_as_it_starts_is_one_line(reference: ReferenceRun, tmp_path: Path) -> None:
    dead = tmp_path / "python"
    dead.write_text(f'#!/bin/sh\ncase "$*" in *forkserver*) kill -9 $$;; esac\nexec {sys.executable} "$@"\n')
    dead.chmod(0o755)
    code = (
        "import multiprocessing, sys; multiprocessing.set_executable(sys.argv.pop(1));"
        "from launch.cli.main import cli; cli(prog_name='avcil')"
    )
    words = command(reference.config, tmp_path / "out")
    done = run([sys.executable, "-c", code, str(dead), *words[3:]])
    assert done.returncode == 2, done.stderr
    assert "avcil: step 0: no process can be started (" in done.stderr
    assert "Traceback" not in done.stderr


def training(config: Path, output: Path, *words: str) -> "subprocess.Popen[str]":
    """Start a long stream, as a process group of its own; return the command once a snapshot is there."""
    words = (*words, "optim.epochs=100000", "snapshot.every_iterations=20")
    process = subprocess.Popen(
        command(config, output, *words),
        cwd=PROJECT,
        env=surroundings({}),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(output.rglob("snapshots/step_000/*/COMMITTED.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def session_of(process: psutil.Process) -> int | None:
    """The session of a process of this machine, None if it has ended since."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def test_two_interrupts_end_with_130_and_leave_no_process(reference: ReferenceRun, tmp_path: Path) -> None:
    process = training(reference.config, tmp_path / "out", "-n", "2")
    session = [other for other in psutil.process_iter() if session_of(other) == process.pid]
    assert len(session) >= 3
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)  # a second key press, while the first is being handled
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    _, alive = psutil.wait_procs(session, timeout=10)
    assert not alive


def test_an_interrupt_of_the_command_alone_ends_its_ranks(reference: ReferenceRun, tmp_path: Path) -> None:
    process = training(reference.config, tmp_path / "out")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
