"""The GPU script runs in small without a GPU, and reports the parts that it skips."""

import json
import subprocess
import sys
from pathlib import Path

from tests.gpu.on_device import Part, lines_of, parts_of, run_part

ROOT = Path(__file__).parents[2]


def test_parts_that_need_no_gpu_run_in_small_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", "tests/gpu/on_device.sh", "run", "-", "--small", "--out", str(tmp_path)]
    command += ["--parts", "kernels,iteration,tests,encoders"]  # the others are tested where `avcil bench` is
    environment = {
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "on_device.json").read_text())["parts"]
    assert {name: part["ended"] for name, part in found.items()} == {
        "kernels": "ok",
        "iteration": "ok",
        "tests": "skipped: needs a GPU",
        "encoders": "ok",
    }
    iteration = found["iteration"]["figures"]
    assert abs(iteration["ours"]["first loss"] / iteration["eager, TF32"]["first loss"] - 1) < 0.02
    assert iteration["profile"]["top"]
    assert found["encoders"]["figures"]["VideoMAE, bf16"]["clips/s"] > 0
    assert "VideoMAE, bf16" in done.stdout


def test_a_part_at_its_limit_is_stopped_and_a_failing_one_shows_its_output(tmp_path: Path) -> None:
    sleeping = Part(("-c", "import time; time.sleep(60)"), limit=1)
    assert run_part("sleeping", sleeping, tmp_path, 1)["ended"] == "stopped after 1 s"
    failing = run_part("failing", Part(("-c", "raise SystemExit('broken')"), limit=20), tmp_path, 20)
    assert failing["ended"] == 1
    assert "broken" in failing["output"]


def test_every_command_of_the_full_run_exists() -> None:
    from click.testing import CliRunner

    from launch.cli.main import cli

    for name in ("step", "stream"):
        words = parts_of(small=False)[name].command[2:]
        shown = CliRunner().invoke(cli, [*words, "--help"])
        assert shown.exit_code == 0, shown.output


def test_figures_are_shown_line_by_line() -> None:
    figures = {"a": {"ms": 1.23456, "TB/s": 2.0}, "top": [["kernel", 0.5, 1]], "b": {"c": {"ms": 1}}}
    assert [line.split() for line in lines_of(figures)] == [
        ["a", "ms", "1.235", "TB/s", "2"],
        ["top"],
        ["kernel", "0.5", "1"],
        ["b"],
        ["c", "ms", "1"],
    ]
