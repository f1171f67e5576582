"""VGGSound's size without its bytes: 199,176 clips of 309 classes."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.plan import EpochPlan, plan_epoch, rank_share
from avcil_dist.data.shard import Shard

PROJECT = Path(__file__).parents[2]
CLIPS, CLASSES, PER_SHARD = 199_176, 309, 64
SCRIPT = r"""
import json, pathlib, re, sys, time
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.plan import plan_epoch, rank_share

started = time.process_time()
manifest = load_manifest(sys.argv[1])
loaded = time.process_time()
settings = dict(seed=0, step=0, epoch=3, global_batch=1024, canonical_nodes=8, window=16)
plan = plan_epoch(manifest, manifest.classes, **settings)
resume = len(plan.batches) // 2
shares = [rank_share(plan.batches[resume:], rank, 64) for rank in range(64)]
spans = [manifest.spans(member, shares[63].ravel()) for member in ("visual.npy", "audio.npy")]
labels = manifest.shard_labels({name: i for i, name in enumerate(manifest.classes)})[manifest.shards_of(plan.batches)]
planned = time.process_time()
print(json.dumps({
    "clips": int(plan.batches.size + plan.rest.size), "batches": len(plan.batches), "rows": shares[63].shape[1],
    "load": loaded - started, "plan": planned - loaded,
    "megabytes": int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1000,
}))
"""


@pytest.fixture(scope="module")
def manifest_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    shards = []
    for number, clips in enumerate(np.array_split(np.arange(CLIPS), CLASSES)):
        for part, first in enumerate(range(0, len(clips), PER_SHARD)):
            own = clips[first : first + PER_SHARD]
            sizes = {"visual.npy": 2_408_576, "audio.npy": 1_664, "json": 120}
            starts = np.cumsum([0, *(512 + size for size in sizes.values())])
            step = int(starts[-1]) + 512
            shards.append(
                Shard.of(
                    url=f"train/c{number:03d}-{part:04d}.tar",
                    class_name=f"class {number}",
                    split="train",
                    bytes=step * len(own) + 1024,
                    sha256=f"{number:032x}{part:032x}",
                    keys=tuple(f"{clip:011d}_000030" for clip in own),
                    offsets={
                        name: np.arange(len(own)) * step + int(start) + 512
                        for name, start in zip(sizes, starts[:-1], strict=True)
                    },
                    sizes={name: np.full(len(own), size) for name, size in sizes.items()},
                )
            )
    url = f"{tmp_path_factory.mktemp('vggsound')}/manifest.json"
    shape = {"frames": 8, "positions": 196, "dim": 768}
    Manifest("feature", tuple(f"class {number}" for number in range(CLASSES)), tuple(shards), shape).save(url)
    return url


@pytest.mark.slow
def test_an_epoch_of_vggsound_is_planned_for_64_ranks_in_seconds(manifest_url: str) -> None:
    words = [sys.executable, "-c", SCRIPT, manifest_url]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(
        f"{found['clips']} clips: manifest read in {found['load']:.2f} s; epoch planned, resumed and shared by 64 "
        f"ranks in {found['plan']:.2f} s of processor; {found['megabytes']:.0f} MB in all"
    )
    assert found["clips"] == CLIPS
    assert found["batches"] == CLIPS // 1024
    assert found["rows"] == 16
    assert found["plan"] < 20  # seconds of processor; 2 are expected
    assert found["megabytes"] < 1000  # half of it is expected


def plan(manifest: Manifest, epoch: int) -> EpochPlan:
    return plan_epoch(
        manifest, manifest.classes, seed=0, step=0, epoch=epoch, global_batch=512, canonical_nodes=8, window=16
    )


def test_each_of_8_machines_reads_an_eighth_of_the_shards_the_same_in_every_epoch(manifest_url: str) -> None:
    manifest = load_manifest(manifest_url)
    counts = np.array([shard.count for shard in manifest.shards])
    by_epoch = [plan(manifest, epoch) for epoch in range(3)]
    read = [
        [set(manifest.shards_of(rank_share(epoch.batches, machine, 8)).ravel().tolist()) for machine in range(8)]
        for epoch in by_epoch
    ]
    readers = Counter(shard for machine in read[0] for shard in machine)
    assert set(readers.values()) == {1, 2}  # a boundary may lie within a shard; a half of it counts for each
    assert sum(number == 2 for number in readers.values()) <= 7
    for machine in range(8):
        clips = sum(counts[shard] / readers[shard] for shard in read[0][machine])
        assert abs(clips - CLIPS / 8) <= PER_SHARD
        for other in read[1:]:
            assert len(read[0][machine] ^ other[machine]) <= 1  # a shard's few clips may be left out of the last batch
    print("shards read by each of 8 machines:", [len(shards) for shards in read[0]], "of", len(counts))


def test_the_batches_of_8_machines_are_those_of_1_2_and_4(manifest_url: str) -> None:
    batches = plan(load_manifest(manifest_url), 1).batches
    for machines in (1, 2, 4, 8):
        shares = [rank_share(batches, machine, machines) for machine in range(machines)]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), batches)


def test_the_shards_in_use_at_a_time_are_bounded_by_the_window(manifest_url: str) -> None:
    manifest = load_manifest(manifest_url)
    own = manifest.shards_of(rank_share(plan(manifest, 0).batches, 0, 8).ravel())
    _, first, length = np.unique(own, return_index=True, return_counts=True)
    last = len(own) - 1 - np.unique(own[::-1], return_index=True)[1]
    in_use = np.zeros(len(own) + 1)
    np.add.at(in_use, first, length)
    np.add.at(in_use, last + 1, -length)
    most = np.cumsum(in_use).max()
    print(f"at most {most / len(own):.1%} of a machine's clips are in shards that are in use")
    assert most <= 16 * length.mean() + 4 * PER_SHARD
    assert most / len(own) < 0.05
