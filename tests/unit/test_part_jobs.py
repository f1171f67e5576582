"""Builds by parts on a cluster: scripts, the words of a part, errors of parts, progress; nothing is submitted."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner, Result

from avcil_dist.errors import AvcilError, ConfigError
from data_shards.build import build_part
from data_shards.build_plan import Part, clips_of_parts
from launch.cli.shards import shards
from launch.cluster.part_jobs import MERGE, PartJobs
from launch.cluster.parts import plan_parts
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.slurm_parts import array_text, merge_text
from launch.cluster.schedulers.slurm_script import REQUEUE_SECONDS
from tests.helpers.rendered import render_tiny

torch.set_num_threads(1)

WORK = PartJobs(
    kind="slurm",
    folder="/data/jobs",
    count=8,
    command=("shards", "build", "--processes", "4", "--", "a b.csv", "$out"),
    merge=("shards", "merge", "--", "$out"),
    code="/data/jobs/code-1",
    working="/data/it's",
    ranks=1,
)


def _cluster(**values: Any) -> ClusterConfig:
    return ClusterConfig(kind="slurm", **values)


def _lines(text: str, beginning: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(beginning)]


def test_the_array_has_a_task_for_each_part() -> None:
    extra = {"comment": "a 'b'", "exclusive": True}
    cluster = _cluster(cpus_per_task=4, hours=2, memory_gb=3, partition="long", extra=extra)
    text = array_text(cluster, WORK)
    assert _lines(text, "#SBATCH") == [
        "#SBATCH --job-name=avcil-build",
        "#SBATCH --partition=long",
        "#SBATCH --time=120",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=3072MB",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR2@120",
        f"#SBATCH --comment={shlex.quote(chr(97) + ' ' + chr(39) + 'b' + chr(39))}",
        "#SBATCH --exclusive",
        "#SBATCH --array=1-8",
        "#SBATCH --output=/data/jobs/part_%a.log",
    ]
    [command] = [line for line in text.splitlines() if " -m avcil_dist " in line]
    words = shlex.split(command.replace('"$SLURM_ARRAY_TASK_ID"', "3").removesuffix(" & run=$!"))
    assert words[1:4] == ["-m", "avcil_dist", "shards"]
    assert words[4:] == ["build", "--part", "3/8", "--processes", "4", "--", "a b.csv", "$out"]
    assert "cd '/data/it'\"'\"'s' || exit 1" in text.splitlines()


def test_the_merge_waits_for_all_parts() -> None:
    text = merge_text(_cluster(setup=["module load x"]), WORK, "71")
    assert "#SBATCH --dependency=afterok:71" in text.splitlines()
    assert "#SBATCH --kill-on-invalid-dep=yes" in text.splitlines()
    assert "module load x" in text.splitlines()
    assert "shards merge -- '$out' & run=$!" in text


def test_a_part_of_features_has_a_process_for_each_gpu() -> None:
    text = array_text(_cluster(gpus_per_node=4, cpus_per_task=6), replace(WORK, ranks=4))
    assert "#SBATCH --ntasks-per-node=4" in text.splitlines()
    assert "#SBATCH --gpus-per-node=4" in text.splitlines()
    assert "\nsrun --export=ALL --cpus-per-task=6 --kill-on-bad-exit=1 " in text
    assert "#SBATCH --cpus-per-task=24" in array_text(_cluster(gpus_per_node=4, cpus_per_task=6), WORK).splitlines()


def _end_of_part(
    folder: Path, program: str, setup: Sequence[str] = (), *, warn: bool = False
) -> tuple[int, list[tuple[str, str]]]:
    """Run the script of a single part whose program is shell text; SLURM fails to requeue it once.

    `warn`: of its time limit, as soon as the file `begun` exists. Returns its exit code, and what it reports as failed.
    """
    work = replace(WORK, folder=str(folder), working=str(folder), code=None, count=1)
    scontrol = f"echo >> {folder}/calls; [ $(wc -l < {folder}/calls) -gt 1 ] && touch {folder}/requeued"
    for name, text in (("program", program), ("scontrol", scontrol)):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    text = array_text(_cluster(setup=setup, python=f"{folder}/program"), work).replace(
        f"sleep {REQUEUE_SECONDS}", "exit 99"
    )
    with work.log("part_1").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", text],
            env={"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
            stdout=log,
            stderr=log,
        )
        deadline = time.monotonic() + 60
        while warn and not (folder / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if warn:
            process.send_signal(signal.SIGUSR2)
        code = process.wait(60)
    return code, [failure for failure in work.failures() if failure[0] != MERGE]


@pytest.mark.slow
@pytest.mark.parametrize("setup", [[], ["set -euo pipefail"]])
def test_the_exit_code_of_a_part_is_kept(tmp_path: Path, setup: list[str]) -> None:
    assert _end_of_part(tmp_path, "exit 3", setup) == (3, [("part_1", "exit code 3")])


@pytest.mark.slow
def test_a_part_whose_setup_fails_names_the_command(tmp_path: Path) -> None:
    failure = ("part_1", "setup failed with exit code 1: test -e /nowhere")
    assert _end_of_part(tmp_path, "exit 0", ["test -e /nowhere"]) == (1, [failure])


@pytest.mark.slow
def test_a_part_near_its_time_limit_is_requeued_though_slurm_does_not_answer_at_first(tmp_path: Path) -> None:
    program = f"touch {tmp_path}/begun; for _ in $(seq 200); do [ -e {tmp_path}/requeued ] && break; sleep 0.05; done"
    assert _end_of_part(tmp_path, program, warn=True)[0] == 99


def test_errors_of_parts_are_read_from_their_logs(tmp_path: Path) -> None:
    work = replace(WORK, folder=str(tmp_path), count=3)
    for name, code, log in (("part_1", "0", ""), ("part_2", "2", "x\navcil: a.csv: bad\nend\n"), (MERGE, None, "")):
        work.log(name).write_text(log)
        if code:
            work.code_file(name).write_text(f"{code}\n")
    assert list(work.failures()) == [("part_2", "a.csv: bad"), ("part_3", "it was ended"), (MERGE, "it was ended")]
    work.save()
    assert PartJobs.load(str(tmp_path)) == work
    work.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["parts.json"]


@pytest.mark.parametrize(
    ("output", "cluster", "words"),
    [
        ("out", {"nodes": 2}, "a part runs on one node"),
        ("memory://x/out", {}, "is not on a disk: set `folder`"),
        ("50%", {}, "%"),
    ],
)
def test_impossible_places_and_resources_are_refused(output: str, cluster: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_parts(output, _cluster(**cluster), 2, ["shards", "build"], strict=False, ranks=1)


@pytest.mark.slow
def test_a_part_on_this_machine_ends_with_its_killed_supervisor(tmp_path: Path) -> None:
    replace(WORK, kind="local", folder=str(tmp_path), working=str(tmp_path), count=1, command=("x", "--", "y")).save()
    script = (
        "from launch.cluster.schedulers import local_parts\n"
        "local_parts.PROGRAM = 'http.server'\n"  # a part that does not end
        f"work = local_parts.PartJobs.load({str(tmp_path)!r})\n"
        "local_parts._run(work, 'part_1', ['--bind', '127.0.0.1', '0'])"
    )
    supervisor = psutil.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (parts := supervisor.children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    supervisor.kill()
    supervisor.wait()
    assert psutil.wait_procs(parts, 30)[1] == []


def _run(*words: object) -> Result:
    return CliRunner().invoke(shards, [str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--parts", "2"], "belong to --cluster"),
        (["--dry-run"], "belong to --cluster"),
        (["--cluster", "slurm"], "--parts N"),
        (["--cluster", "slurm", "--parts", "2", "--part", "1/2"], "--part is one part"),
        (["--cluster", "nowhere", "--parts", "2"], "no such file"),
        (["--cluster", "local", "--parts", "2", "--dry-run"], "has none"),
        (["cluster.nodes=2"], "give one with --cluster"),
        (["--cluster", "slurm", "--parts", "2", "optim.lr=1"], "left over"),
    ],
)
def test_contradicting_options_are_refused(tmp_path: Path, words: list[str], error: str) -> None:
    (tmp_path / "c.csv").write_text("path,label,split\na.mp4,dog,train\n")
    result = _run("build", tmp_path / "c.csv", tmp_path / "out", *words)
    assert isinstance(result.exception, AvcilError)
    assert error in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_words_of_a_part(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("path,label\na.mp4,dog\n")
    words = ["--split", "0.5,0.2,0.3", "--keep-muted", "--strict", "--min-seconds", "2"]
    cluster = ["--cluster", "slurm", "--parts", "3", "--dry-run", "cluster.cpus_per_task=6"]
    result = _run("build", tmp_path / "c.csv", tmp_path / "out", *words, *cluster)
    assert result.exit_code == 0, result.output
    options = "--split 0.5,0.2,0.3 --min-seconds 2.0 --keep-muted --processes 6 --"
    source = f"{tmp_path}/c.csv {tmp_path}/out"
    part = f'avcil_dist shards build --part "$SLURM_ARRAY_TASK_ID"/3 {options} {source} & run=$!'
    assert part in result.output
    assert f"avcil_dist shards merge --strict -- {tmp_path}/out & run=$!" in result.output
    assert not (tmp_path / "out").exists()


def test_progress_of_parts_is_counted_in_clips(tmp_path: Path) -> None:
    source, output = render_tiny(tmp_path / "clips"), str(tmp_path / "out")
    assert clips_of_parts(output) is None
    build_part(source, output, Part(0, 2), clips_per_shard=2, min_seconds=0.5)
    assert clips_of_parts(output) == (5, 10)
    build_part(source, output, Part(1, 2), clips_per_shard=2, min_seconds=0.5)
    assert clips_of_parts(output) == (10, 10)
