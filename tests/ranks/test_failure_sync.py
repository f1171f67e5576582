"""When one rank fails, all end within seconds, with the same message."""

import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from avcil_dist.config.schema import EngineConfig
from avcil_dist.errors import AvcilError, DataError
from avcil_dist.streams.summary import is_committed
from avcil_dist.training.collectives import process_group
from avcil_dist.training.failure_sync import propagate_failures
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from launch.fork_server import PRELOADED
from launch.local_worlds import local_worlds
from tests.helpers.disks import small_disk
from tests.helpers.ranks import CPU
from tests.helpers.streams import CLASSES, write_config

ROOT = Path(__file__).parents[2]
SECONDS = 10


def rank_of_three(world: World, reports: Any, fault: str) -> None:
    """Fail on rank 1 alone, while rank 0 waits in a collective and rank 2 computes without any."""
    with process_group(world, CPU, EngineConfig(timeout_minutes=5)) as store:
        dist.barrier()
        reports.put((world.rank, "begun", time.monotonic()))
        try:
            with propagate_failures(store, world, lambda error: reports.put((world.rank, "ended", str(error)))):
                if world.rank == 1:
                    raise DataError("clip x is damaged") if fault == "typed" else ZeroDivisionError("a bug")
                if world.rank == 0:
                    dist.barrier()
                time.sleep(60)
        except AvcilError as error:
            reports.put((world.rank, "raised", str(error)))
            sys.exit(2)


@pytest.mark.parametrize(
    ("fault", "message", "codes"),
    [("typed", "clip x is damaged", [2, 2, 2]), ("bug", "rank 1 failed: ZeroDivisionError: a bug", [2, 1, 2])],
)
def test_one_rank_fails_and_all_end_with_its_message(fault: str, message: str, codes: list[int]) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    reports = context.SimpleQueue()
    with local_worlds(3) as worlds:
        ranks = [context.Process(target=rank_of_three, args=(world, reports, fault)) for world in worlds]
        for process in ranks:
            process.start()
        begun = [reports.get() for _ in ranks]
        for process in ranks:
            process.join(60)
    assert time.monotonic() - max(moment for _, _, moment in begun) < SECONDS
    assert [process.exitcode for process in ranks] == codes
    messages = {}
    while not reports.empty():
        rank, _, text = reports.get()
        messages[rank] = text
    assert messages.keys() >= {0, 2}
    assert all(message in text for text in messages.values())


def fails(config: Path, *words: str, **environment: str) -> str:
    """Run a command on two ranks that must end with a user error; returns its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "avcil_dist", "train", str(config), "-n", "2", *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    line = [line for line in done.stderr.splitlines() if line.startswith("avcil: ")][-1]  # the tracker may have one too
    assert "Traceback" not in done.stderr
    return line


def test_a_loss_that_is_not_finite_names_the_clips_of_its_batch(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_feature_shards(shards, classes=CLASSES, clips={"train": 24, "val": 6, "test": 10})
    poisoned = min(shards.glob("train/*.tar"))
    data = bytearray(poisoned.read_bytes())
    start = data.index(b"\x93NUMPY") + 128
    data[start : start + 2] = np.float16("nan").tobytes()
    poisoned.write_bytes(data)
    line = fails(write_config(tmp_path))
    assert "the loss is nan" in line
    assert "step 0, iteration" in line
    keys = line.rpartition(": ")[2].split(", ")
    assert len(keys) == 12  # of both ranks
    assert not is_committed(str(tmp_path / "runs" / "tiny-avcil-seed0"), 0)


def test_a_full_disk_ends_all_ranks_and_leaves_no_half_snapshot_that_counts(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=24):
        config = write_config(tmp_path, snapshot={"every_iterations": 3, "folder": str(tmp_path / "disk")})
        line = fails(config)
        assert "No space left on device" in line
        assert "make room" in line
        assert not list((tmp_path / "disk").rglob("COMMITTED.json"))
