"""Lanes of a sweep on one machine, without training: cores, order, failures."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avcil_dist.compose import load_config
from avcil_dist.errors import TrainingError
from launch import parallel_streams
from launch.parallel_streams import MachineLane, run_streams, share_cores
from launch.sweep import GridPoint


def test_lanes_share_out_the_cores() -> None:
    assert share_cores([0, 1, 4, 5], 2) == [{0, 4}, {1, 5}]
    assert share_cores([2, 3, 9], 2) == [{2, 9}, {3}]
    assert share_cores([2, 3], 3) == [{2}, {3}, {2}]


@pytest.fixture
def points(tmp_path: Path) -> list[GridPoint]:
    configs = [load_config("demo", [f"output={tmp_path}", f"name=n{number}"]) for number in range(4)]
    return [GridPoint(config, (f"seed={number}",)) for number, config in enumerate(configs)]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [None, 1])
def test_streams_run_in_their_order_until_one_fails(
    points: list[GridPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int | None
) -> None:
    def start(config: str, point: GridPoint, lane: MachineLane, ranks: int, *, smoke: bool) -> Any:
        number = points.index(point)
        code = "import time; time.sleep(600)"  # beside one that fails: until it is ended
        if failing in (None, number):
            code = f"raise SystemExit({7 * (number == failing)})"
        return parallel_streams.subprocess.Popen([sys.executable, "-S", "-c", code])

    monkeypatch.setattr(parallel_streams, "_start", start)
    started: list[int] = []
    lanes = [SimpleNamespace(), SimpleNamespace()]
    if failing is None:
        folders = run_streams("demo", points, lanes, 1, started.append)  # type: ignore[arg-type]
        assert folders == [f"{tmp_path}/n{number}-avcil-seed0" for number in range(4)]
        assert started == [0, 1, 2, 3]
    else:
        with pytest.raises(TrainingError, match=r"n1-avcil-seed0: its training ended with exit code 7"):
            run_streams("demo", points, lanes, 1, started.append)  # type: ignore[arg-type]
        assert started == [0, 1]
