"""The GPU script runs in small without a GPU, and reports the parts that it skips."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu.on_device import LOG, Part, lines_of, parts_of, run_part, run_parts
from tests.gpu.repack import repack
from tests.gpu.run_tests import run_tests

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "on_device.sh"


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
    log = (tmp_path / LOG).read_text()
    assert log.index("######## sleeping") < log.index("######## failing") < log.index("broken")


def test_results_of_a_run_without_time_are_written(tmp_path: Path) -> None:
    found = run_parts(["kernels", "tests"], {"device": "cpu"}, tmp_path, seconds=0, small=True)
    assert [part["ended"] for part in found.values()] == ["skipped: no time is left", "skipped: needs a GPU"]
    assert json.loads((tmp_path / "on_device.json").read_text())["parts"] == found
    assert "== tests: skipped: needs a GPU, 0.0 s" in (tmp_path / "on_device.txt").read_text()


def test_a_test_that_hangs_is_stopped_and_shows_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, results = tmp_path / "test_made.py", tmp_path / "results.json"
    file.write_text("import time\ndef test_hangs():\n    time.sleep(600)\ndef test_fails():\n    assert not 'broken'\n")
    tests = [f"{file}::test_hangs", f"{file}::test_fails"]
    found = run_tests(tests, results, limit=10, side_by_side=2)
    assert [found[test]["ended"] for test in tests] == ["stopped after 10 s", "failed"]
    assert json.loads(results.read_text()) == found
    shown = capfd.readouterr().out
    assert "in test_hangs" in shown
    assert "assert not 'broken'" in shown


def test_a_repacked_wheel_has_the_same_files(tmp_path: Path) -> None:
    wheel, text = tmp_path / "made-1-py3-none-any.whl", b"the same words again and again " * 1000
    with zipfile.ZipFile(wheel, "w") as stored:
        stored.writestr("made/words.txt", text)
    repack(wheel)
    assert wheel.stat().st_size < len(text) / 10
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]
    with zipfile.ZipFile(wheel) as packed:
        assert packed.read("made/words.txt") == text


def test_every_command_of_the_full_run_exists() -> None:
    from click.testing import CliRunner

    from launch.cli.main import cli

    for name in ("step", "stream"):
        words = parts_of(small=False)[name].command[2:]
        shown = CliRunner().invoke(cli, [*words, "--help"])
        assert shown.exit_code == 0, shown.output


def test_a_machine_without_an_index_gets_all_that_the_package_requires() -> None:
    lists = {
        name: {canonicalize_name(word) for word in words.split()}
        for name, words in re.findall(r"^(PRESENT|WHEELS|BUILT)=\(([^)]*)\)", SCRIPT.read_text(), re.MULTILINE)
    }
    machine = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    missing, waiting, seen = set[str](), [*required()], set[str]()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen or name in lists["PRESENT"]:
            continue
        seen.add(name)
        if name not in lists["WHEELS"] | lists["BUILT"]:
            missing.add(name)
            continue
        needed = map(Requirement, metadata.requires(name) or [])
        waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate(machine)]
    assert not missing
    assert seen == lists["WHEELS"] | lists["BUILT"], "packages that nothing requires"


def required() -> list[str]:
    """The names of the packages that setup.py requires."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    [words] = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIRED"
    ]
    return [Requirement(text).name for text in ast.literal_eval(words)]


def test_figures_are_shown_line_by_line() -> None:
    figures = {"a": {"ms": 1.23456, "TB/s": 2.0}, "top": [["kernel", 0.5, 1]], "b": {"c": {"ms": 1}}}
    assert [line.split() for line in lines_of(figures)] == [
        ["a", "ms", "1.235", "TB/s", "2"],
        ["top"],
        ["kernel", "0.5", "1"],
        ["b"],
        ["c", "ms", "1"],
    ]
