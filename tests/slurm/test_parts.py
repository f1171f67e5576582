"""Builds by parts as jobs of a real SLURM: Ctrl-C leaves them, the same command continues, to the same bytes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from avcil_dist.data.manifest import load_manifest
from data_shards.build import build_shards
from data_shards.verify import verify_shards
from launch.sandbox.cluster import Sandbox
from tests.helpers.chains import no_job_starts, wait_for
from tests.helpers.commands import PROJECT, run_avcil
from tests.helpers.rendered import render_tiny

SMALL = ("weights=random", "dim=32", "depth=1", "heads=2")
ENCODERS = [f"model.{stream}.{word}" for stream in ("visual", "audio") for word in SMALL]


def test_a_build_by_parts_continues_after_an_interruption_and_a_loss(sandbox: Sandbox, tmp_path: Path) -> None:
    source, output = render_tiny(tmp_path / "clips", train=6), tmp_path / "it's out"
    whole = build_shards(source, f"{tmp_path}/whole", clips_per_shard=2, min_seconds=0.5, keep_muted=False)
    words = ["shards", "build", source, output, "--clips-per-shard", 2, "--cluster", "slurm", "--parts", 2]

    with no_job_starts(sandbox):
        command = [sys.executable, "-m", "avcil_dist", *map(str, words)]
        watching = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, env=os.environ)
        assert watching.stderr is not None
        assert "2 parts submitted" in watching.stderr.readline()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 130
        told = re.search(r"To end them: (scancel \d+ \d+)$", watching.stderr.read(), re.MULTILINE)
        assert told
        refused = run_avcil(*words[:-1], 3)
        assert refused.returncode == 2
        assert f"end them first: {told[1]}" in refused.stderr
        sandbox.run(*told[1].split())
        wait_for(lambda: not sandbox.run("squeue", "--noheader").stdout.strip(), "the end of the jobs")

    built = run_avcil(*words)
    assert built.returncode == 0, built.stderr
    assert "written: 16 clips, 2 classes, 10 shards" in built.stdout
    assert load_manifest(f"{output}/manifest.json").content_hash == whole.manifest.content_hash
    assert verify_shards(f"{output}/manifest.json") == []
    assert not (output / "parts").exists()

    features = ["shards", "features", f"{output}/manifest.json", tmp_path / "features", "--cluster", "slurm"]
    sizes = ("data.clip.frames=4", "data.clip.size=32", "data.decode_workers=0", "cluster.tasks_per_node=2")
    encoded = run_avcil(*features, "--parts", 1, *sizes, *ENCODERS)
    assert encoded.returncode == 0, encoded.stderr
    assert "written: 16 clips" in encoded.stdout
    assert verify_shards(f"{tmp_path}/features/manifest.json") == []


def test_the_error_of_a_part_is_that_of_the_command(sandbox: Sandbox, tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips", train=1, val=0, test=0)
    source.write_text(source.read_text() + "gone.mp4,class_000,train\n")
    words = ["shards", "build", source, tmp_path / "out", "--strict", "--cluster", "slurm", "--parts", 1]
    failed = run_avcil(*words)
    assert failed.returncode == 2
    [line] = [line for line in failed.stderr.splitlines() if line.startswith("avcil: ")]
    assert "merge: " in line
    assert "1 clip rejected" in line
    assert "missing file" in line


def test_doctor_measures_the_nodes_of_a_cluster_file_in_a_job(sandbox: Sandbox, tmp_path: Path) -> None:
    words = ["doctor", f"output={tmp_path}/runs", "--cluster", "slurm", "cluster.nodes=2", "cluster.tasks_per_node=1"]
    ran = run_avcil(*words)
    [line] = [line for line in ran.stdout.splitlines() if "all-reduce" in line]
    assert line.startswith("✓"), ran.stdout + ran.stderr
    assert "2 ranks on 2 nodes, gloo; 1.0 kB: " in line
