"""`avcil bench` measures real iterations, on sizes that take seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["--frames", "2", "--positions", "16", "--dim", "32"]


def bench(folder: Path, *words: str) -> dict:
    path = folder / "found.json"
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-m", "launch", "bench", *words, *SMALL, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_step_compares_the_same_loss_in_time_and_memory(tmp_path: Path) -> None:
    found = bench(tmp_path, "step", "--turns", "1", "--threads", "1", "--precision", "bf16")
    sides = found["sides"]
    assert set(sides) == {"eager", "ours", "logits given"}
    for side in sides.values():
        assert side["first_loss"] == pytest.approx(sides["eager"]["first_loss"], rel=0.01)
        assert 0 < sum(side["seconds_by_part"].values()) < side["seconds"]
        assert side["eager_time_ratio"] > 0
        assert side["peak_bytes"] > 0
    assert set(found["ceilings"]) == {"matmul float32", "matmul bf16", "copy"}


def test_stream_trains_two_steps_and_extrapolates(tmp_path: Path) -> None:
    words = [
        "optim.global_batch=8",
        "optim.global_replay_batch=4",
        "optim.global_eval_batch=8",
        "--clips",
        "16",
        "--iterations",
        "4",
    ]
    found = bench(tmp_path, "stream", *words)
    assert found["iterations"] == 4
    assert 0 <= found["waiting_share_later_epochs"] < 1
    hours = 10 * 200 * (5119 // 8) / found["iterations_per_second"] / 3600
    assert found["vs100_ci_hours"]["training"] == pytest.approx(hours)
    assert found["vs100_ci_hours"]["validation"] == pytest.approx(
        200 * 27_500 / found["validation_clips_per_second"] / 3600
    )


def test_loader_is_measured_beside_the_disk(tmp_path: Path) -> None:
    found = bench(tmp_path, "loader", "--clips", "64", "--batch", "8", "--repeats", "1")
    assert all(value > 0 for value in found["gigabytes_per_second"].values())
    assert len(found["gigabytes_per_second"]) == 3
