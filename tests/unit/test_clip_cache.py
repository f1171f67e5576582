"""Clip cache: the same batches from every tier, each clip read once, no files left behind."""

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist.data.batch import Batch
from avcil_dist.data.clip_cache import ClipCache, EntrySpec
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.loader import load_on_device
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.training import clip_cache_placement
from avcil_dist.training.clip_cache_placement import LIMITS, _fastest, _free_in_group, free_host_bytes
from data_shards.random_features import make_feature_shards
from tests.helpers.features import damage
from tests.helpers.reading import digest, labels_of, total, training_source
from tests.helpers.rendered import tiny_manifest

CPU = torch.device("cpu")
BAD = "train-001-00003"
EPOCHS = 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """4 classes of 12 clips, one of which is damaged."""
    folder = tmp_path_factory.mktemp("shards")
    url = make_feature_shards(folder, classes=4, clips={"train": 12}, clips_per_shard=6)
    damage(folder, BAD)
    return load_manifest(url)


def sampler_of(manifest: Manifest, **settings: object) -> TrainingSampler:
    exemplars = manifest.clips(["class_000"], "train")[:5]  # a batch of 4 may have one of them twice
    return training_source(manifest, epochs=EPOCHS, exemplars=exemplars, **settings)  # type: ignore[arg-type]


def cache_of(manifest: Manifest, clips: np.ndarray, tier: str) -> ClipCache:
    spec = EntrySpec.of(manifest, ClipInputs.of(sampler_of(manifest).data.clip))
    return ClipCache(clips, spec, CPU if tier == "device" else None)


def batches_of(sampler: TrainingSampler, cache: ClipCache | None) -> list[Batch]:
    labels = labels_of(sampler.manifest)
    loaded = load_on_device(
        sampler, manifest=sampler.manifest, labels=labels, data=sampler.data, device=CPU, clip_cache=cache
    )
    return list(loaded)


@pytest.mark.parametrize("part", [1.0, 0.4], ids=["all", "some"])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_batches_are_the_same_from_every_tier_and_a_clip_is_read_once(
    manifest: Manifest, tier: str, part: float
) -> None:
    sampler = sampler_of(manifest)
    plain = batches_of(sampler, None)
    clips = sampler.clips[: int(part * len(sampler.clips))]
    cache = cache_of(manifest, clips, tier)
    found = batches_of(sampler, cache)
    assert [digest(batch) for batch in found] == [digest(batch) for batch in plain]
    assert [batch.clips.tolist() for batch in found] == [batch.clips.tolist() for batch in plain]
    faults = [batch.faults for batch in found]
    assert faults == [batch.faults for batch in plain]  # damaged in each epoch, not in the first alone
    assert sum(map(len, faults)) > 1
    if part == 1:
        again = batches_of(sampler, cache)
        assert total(again)["read_bytes"] < total(plain)["read_bytes"] / 20  # what is damaged, and only that
        assert [digest(batch) for batch in again] == [digest(batch) for batch in plain]


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["device", "host"])
def test_decoded_clips_are_cached_from_their_first_epoch_on(tmp_path: Path, tier: str) -> None:
    videos = tiny_manifest(tmp_path, ["a", "b"], {"train": 4})
    clip = {"frames": 2, "size": 16, "mel_frames": 16, "mel_bins": 8}
    sampler = training_source(videos, epochs=3, batch=4, clip=clip, decode_workers=1)
    plain = [digest(batch) for batch in batches_of(sampler, None)]
    cache = ClipCache(
        sampler.clips, EntrySpec.of(videos, ClipInputs.of(sampler.data.clip)), CPU if tier == "device" else None
    )
    assert [digest(batch) for batch in batches_of(sampler, cache)] == plain
    again = batches_of(sampler, cache)
    assert [digest(batch) for batch in again] == plain
    assert total(again)["read_bytes"] == 0


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_step_that_resumes_within_an_epoch_reads_the_clips_that_are_not_cached(manifest: Manifest, tier: str) -> None:
    whole = [digest(batch) for batch in batches_of(sampler_of(manifest), None)]
    resumed = sampler_of(manifest, start=3)
    cache = cache_of(manifest, resumed.clips, tier)
    assert [digest(batch) for batch in batches_of(resumed, cache)] == whole[3:]


def test_host_memory_is_mapped_by_other_processes_and_leaves_no_file(manifest: Manifest) -> None:
    sampler = sampler_of(manifest)
    cache = cache_of(manifest, sampler.clips, "host")
    batches_of(sampler, cache)
    copied = pickle.loads(pickle.dumps(cache))
    request = next(iter(sampler))
    assert len(copied.mark_missing(request).to_read.clips) == len(cache.mark_missing(request).to_read.clips) <= 1
    assert not list(Path("/dev/shm").glob("*avcil*"))
    path = cache.memory.path
    del cache, copied
    gc.collect()
    assert not Path(path).exists()


# As the kernel names them: documentation of cgroup-v1/memory and of cgroup-v2.
KERNEL_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.mark.parametrize("controller", KERNEL_FILES)
def test_free_memory_is_that_of_the_tightest_control_group(
    controller: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < free_host_bytes() < 2**50
    root, limit, use, droppable = KERNEL_FILES[controller]
    assert LIMITS[controller] == (Path("/sys/fs/cgroup") / root, limit, use, droppable)
    for folder, most in ((tmp_path / "job", 5000), (tmp_path / "job" / "task", 9000)):
        folder.mkdir()
        (folder / limit).write_text(f"{most}\n")
        (folder / use).write_text("3000\n")
        (folder / "memory.stat").write_text(f"anon 7\n{droppable} 1000\n")
    assert _free_in_group("job/task", tmp_path, limit, use, droppable) == [7000, 3000]

    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 8 kB\n")
    (proc / "self" / "cgroup").write_text(f"7:{controller}:/job/task\n3:cpu:/job\n")
    monkeypatch.setattr(clip_cache_placement, "PROC", proc)
    monkeypatch.setitem(LIMITS, controller, (tmp_path, limit, use, droppable))
    assert free_host_bytes() == 3000
    (tmp_path / "job" / limit).write_text("max\n")
    assert free_host_bytes() == 7000
    (tmp_path / "job" / "task" / limit).write_text("max\n")
    assert free_host_bytes() == 8 * 1024


@pytest.mark.parametrize(
    ("on_device", "on_host", "tier"), [(9, 5, "device"), (9, 99, "device"), (8, 8, "device"), (8, 9, "host")]
)
def test_clips_that_do_not_fit_a_gpu_are_cached_where_more_of_them_fit(on_device: int, on_host: int, tier: str) -> None:
    counts = {"device": on_device, "host": on_host}
    assert _fastest(counts, 9, torch.device("cuda")) == tier
    assert _fastest(counts, 9, torch.device("cpu")) == "host"
