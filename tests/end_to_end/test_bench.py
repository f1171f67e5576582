"""`avcil bench` measures real iterations, on sizes that take seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.rendered import render_tiny

SMALL = ["--frames", "2", "--positions", "16", "--dim", "32"]


def bench(folder: Path, *words: str, size: Sequence[str] = SMALL) -> dict:
    path = folder / "figures.json"
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-m", "avcil_dist", "bench", *words, *size, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_step_compares_the_same_loss_in_time_and_memory(tmp_path: Path) -> None:
    figures = bench(tmp_path, "step", "--turns", "1", "--threads", "1", "--precision", "bf16")
    contenders = figures["contenders"]
    assert set(contenders) == {"eager", "ours", "ours, teacher cached"}
    for contender in contenders.values():
        assert contender["first_loss"] == pytest.approx(contenders["eager"]["first_loss"], rel=0.01)
        assert 0 < sum(contender["seconds_by_part"].values()) < contender["seconds"]
        assert contender["eager_time_ratio"] > 0
        assert contender["peak_bytes"] > 0
    assert set(figures["ceilings"]) == {"matmul float32", "matmul bf16", "copy"}


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
    figures = bench(tmp_path, "stream", *words)
    assert figures["iterations"] == 4
    assert 0 <= figures["waiting_share_later_epochs"] < 1
    hours = 10 * 200 * (5119 // 8) / figures["iterations_per_second"] / 3600
    assert figures["vs100_ci_hours"]["training"] == pytest.approx(hours)
    assert figures["vs100_ci_hours"]["validation"] == pytest.approx(
        200 * 27_500 / figures["validation_clips_per_second"] / 3600
    )


def test_loader_is_measured_beside_the_disk(tmp_path: Path) -> None:
    figures = bench(tmp_path, "loader", "--clips", "64", "--batch", "8", "--repeats", "1")
    assert all(value > 0 for value in figures["gigabytes_per_second"].values())
    assert len(figures["gigabytes_per_second"]) == 3


def test_decoding_is_measured_beside_plain_decoding(tmp_path: Path) -> None:
    clips = render_tiny(tmp_path / "rendered", val=0, test=0).parent
    words = ["--clips", str(clips), "--count", "40", "--batch", "4", "--processes", "1", "--repeats", "1"]
    figures = bench(tmp_path, "video", *words, size=())
    rates = figures["clips_per_second"]
    assert {"PyAV, all frames", "avcil shards build", "training batches"} <= rates.keys()
    assert all(value > 0 for value in rates.values())
    assert figures["share_of_plain_decoding"]["PyAV, all frames"] == 1
