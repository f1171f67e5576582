"""Clips that crash their decoder while shards are built: they are rejected, and remembered across starts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avcil_dist.data.manifest import load_manifest
from data_shards.build import BuildReport, BuildSettings, build_shards, plan_build
from data_shards.build_plan import load_crashes, save_crashes
from data_shards.listings.read import read_listing
from data_shards.rejections import read_rejections
from tests.helpers.lethal import CRASH, END, decoder_hook
from tests.helpers.rendered import render_tiny

torch.set_num_threads(1)


def _build(source: Path, output: Path) -> BuildReport:
    return build_shards(source, str(output), clips_per_shard=2, min_seconds=0.5)


def test_clip_that_crashed_its_decoder_is_not_tried_at_the_next_start(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips", classes=1, val=0, test=0)
    plan, _ = plan_build(read_listing(source), BuildSettings(2, 0.5, True))
    output = str(tmp_path / "out")
    save_crashes(output, plan.jobs[0], frozenset({1}))
    assert load_crashes(output, plan.jobs) == {0: {1}}
    report = _build(source, tmp_path / "out")
    assert [(rejection.kind, rejection.reason) for rejection in report.rejected] == [("crash", "its decoder crashed")]
    assert [shard.count for shard in report.manifest.shards] == [1, 1]


def test_changed_clips_are_tried_again(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips", classes=1, val=0, test=0)
    plan, _ = plan_build(read_listing(source), BuildSettings(2, 0.5, True))
    save_crashes(str(tmp_path / "out"), replace(plan.jobs[0], digest="of other clips"), frozenset({1}))
    assert _build(source, tmp_path / "out").rejected == ()


@pytest.mark.slow
def test_decoder_that_crashes_four_times_in_a_shard_gives_four_rejections(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips", classes=1, train=6, val=0, test=0)
    clips = sorted((tmp_path / "clips").rglob("*.mp4"))
    for path in clips[1:5]:
        path.write_bytes(path.read_bytes() + END)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(decoder_hook(CRASH))
    project = str(Path(__file__).parents[2])
    words = ["-m", "avcil_dist", "shards", "build", str(source), str(tmp_path / "out"), "--processes", "1"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}/hook:{project}"}
    run = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    rejected = read_rejections(str(tmp_path / "out/rejected.csv"))
    assert [(Path(row.path).name, row.kind) for row in rejected] == [(path.name, "crash") for path in clips[1:5]]
    assert load_manifest(str(tmp_path / "out/manifest.json")).shards[0].count == 2
