import io
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist import storage
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, DataConfig
from avcil_dist.data import loader
from avcil_dist.data.batch import Batch
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.plan import PADDING, plan_epoch, plan_evaluation, plan_replay
from avcil_dist.data.sampler import FixedSampler, TrainingSampler
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.rendered import tiny_manifest

torch.set_num_threads(1)
SMALL_CLIP = ClipConfig(frames=2, size=32, mel_bins=16, mel_frames=32)
OPTIM = OptimConfig(epochs=2, global_batch=4, global_replay_batch=2)


def data_config(manifest: Manifest, workers: int = 0) -> DataConfig:
    return DataConfig(
        manifest=f"{manifest.root}/manifest.json", decode_workers=workers, shuffle_window=2, clip=SMALL_CLIP
    )


def labels_of(manifest: Manifest) -> dict[str, int]:
    """The last class arrived first."""
    return {name: label for label, name in enumerate(reversed(manifest.classes))}


def load(source: FixedSampler | TrainingSampler, manifest: Manifest, workers: int = 0) -> list[Batch]:
    data = data_config(manifest, workers)
    return list(load_batches(source, manifest=manifest, labels=labels_of(manifest), data=data))


def training(
    manifest: Manifest, *, rank: int = 0, size: int = 1, start: int = 0, exemplars: int = 0
) -> TrainingSampler:
    return TrainingSampler(
        manifest=manifest,
        classes=manifest.classes[:2],
        exemplars=manifest.clips(manifest.classes[2:], "train")[:exemplars],
        data=data_config(manifest),
        optim=OPTIM,
        seed=3,
        step=1,
        world=World(rank=rank, size=size),
        start=start,
    )


@pytest.fixture
def features(tmp_path: Path) -> Manifest:
    """Three classes of 9 training clips in shards of 4, 4 and 1."""
    return load_manifest(make_feature_shards(tmp_path, classes=3, clips={"train": 9}, clips_per_shard=4))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two classes of 4 rendered training clips, one shard each."""
    return tiny_manifest(tmp_path_factory.mktemp("clips"), ("cat", "dog"), {"train": 4})


def stored(manifest: Manifest, clip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the shard holds of a feature clip, read by tar offsets alone."""
    number, row = manifest.locate(clip)
    shard, content = manifest.shards[number], Path(manifest.url(number)).read_bytes()
    visual, audio = (
        torch.from_numpy(np.load(io.BytesIO(content[shard.offsets[member][row] :]), allow_pickle=False))
        for member in ("visual.npy", "audio.npy")
    )
    return visual.view(manifest.shape["frames"], manifest.shape["positions"], manifest.shape["dim"]), audio


def damage(manifest: Manifest, clip: int, member: str) -> None:
    """Zero the bytes of one member in its tar."""
    number, row = manifest.locate(clip)
    shard, path = manifest.shards[number], Path(manifest.url(number))
    start, size = int(shard.offsets[member][row]), int(shard.sizes[member][row])
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("visual", "audio", "labels", "valid"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.num_current, one.faults) == (other.num_current, other.faults)


def test_training_batches_are_the_plans(features: Manifest) -> None:
    batches = load(training(features, exemplars=3), features)
    plans = [
        plan_epoch(
            features, features.classes[:2], seed=3, step=1, epoch=epoch, global_batch=4, canonical_nodes=1, window=2
        )
        for epoch in range(2)
    ]
    current = np.concatenate([plan.batches for plan in plans])
    exemplars = features.clips(features.classes[2:], "train")[:3]
    replay = plan_replay(exemplars, seed=3, step=1, first=0, count=len(current), global_batch=2)
    assert len(batches) == len(current) == 8
    labels = labels_of(features)
    for batch, row in zip(batches, np.concatenate([current, replay], axis=1), strict=True):
        assert batch.num_current == 4
        assert batch.valid.all()
        assert batch.labels.tolist() == [labels[features.class_of(clip)] for clip in row]
        for place, clip in enumerate(row):
            visual, audio = stored(features, clip)
            assert torch.equal(batch.visual[place], visual)
            assert torch.equal(batch.audio[place], audio)


@pytest.mark.parametrize("start", [1, 3, 4, 5, 8])
def test_a_start_in_the_middle_gives_the_suffix(features: Manifest, start: int) -> None:
    whole = load(training(features, exemplars=3), features)
    rest = load(training(features, exemplars=3, start=start), features)
    assert len(rest) == len(whole) - start
    for one, other in zip(rest, whole[start:], strict=True):
        assert_equal(one, other)


def test_ranks_together_have_the_batches_of_one(features: Manifest) -> None:
    whole = load(training(features, exemplars=3), features)
    ranks = [load(training(features, exemplars=3, rank=rank, size=2), features) for rank in range(2)]
    for all_rows, first, second in zip(whole, *ranks, strict=True):
        assert first.num_current == second.num_current == 2
        current = torch.cat([first.visual[:2], second.visual[:2]])
        replay = torch.cat([first.visual[2:], second.visual[2:]])
        assert torch.equal(torch.cat([current, replay]), all_rows.visual)


@pytest.mark.slow
def test_decoding_processes_do_not_change_the_batches(clips: Manifest) -> None:
    source = FixedSampler(plan_evaluation(clips.clips(clips.classes, "train")[::-1], 3))
    here, there = load(source, clips, workers=0), load(source, clips, workers=2)
    assert [batch.labels.tolist() for batch in here] == [[0, 0, 0], [0, 1, 1], [1, 1, 0]]
    assert [batch.valid.tolist() for batch in here] == [[True] * 3, [True] * 3, [True, True, False]]
    assert here[0].visual.shape == (3, 2, 3, 32, 32)
    assert here[0].audio.shape == (3, 32, 16)
    assert not torch.equal(here[0].visual[0], here[0].visual[1])
    for one, other in zip(here, there, strict=True):
        assert_equal(one, other)


@pytest.mark.slow
def test_one_shard_serves_two_ranks_of_two_processes_each_clip_once(clips: Manifest) -> None:
    alone = replace(clips, classes=("cat",), shards=clips.shards[:1])
    reference = load(FixedSampler(np.array([[0, 1, 2, 3]])), alone)[0].visual
    config = OptimConfig(epochs=1, global_batch=2)
    found = []
    for rank in range(2):
        source = replace(training(alone, rank=rank, size=2), optim=config, classes=alone.classes)
        batches = load(source, alone, workers=2)
        assert [len(batch.labels) for batch in batches] == [1, 1]
        for batch in batches:
            found += [clip for clip in range(4) if torch.equal(batch.visual[0], reference[clip])]
    assert sorted(found) == [0, 1, 2, 3]


def test_padding_is_not_valid_and_no_fault(features: Manifest) -> None:
    (batch,) = load(FixedSampler(np.array([[0, PADDING, 1, PADDING]])), features)
    assert batch.valid.tolist() == [True, False, True, False]
    assert batch.faults == ()
    assert not batch.visual[[1, 3]].any()


@pytest.mark.parametrize("member", ["visual.npy", "audio.npy"])
def test_a_damaged_feature_clip_is_skipped_and_named(features: Manifest, member: str) -> None:
    whole = load(FixedSampler(np.array([[0, 1, 2, 3]])), features)[0]
    damage(features, 2, member)
    (batch,) = load(FixedSampler(np.array([[0, 1, 2, 3]])), features)
    assert batch.valid.tolist() == [True, True, False, True]
    assert len(batch.faults) == 1
    assert features.key(2) in batch.faults[0]
    assert "\n" not in batch.faults[0]
    assert not batch.visual[2].any()
    assert torch.equal(batch.visual[[0, 1, 3]], whole.visual[[0, 1, 3]])
    assert torch.equal(batch.audio[[0, 1, 3]], whole.audio[[0, 1, 3]])
    assert torch.equal(batch.labels, whole.labels)


def test_a_damaged_video_is_skipped_and_named(clips: Manifest, tmp_path: Path) -> None:
    moved = replace(clips, root=str(tmp_path))
    for number, shard in enumerate(clips.shards):
        storage.write_bytes(f"{tmp_path}/{shard.url}", storage.read_bytes(clips.url(number)))
    damage(moved, 5, "mp4")
    (batch,) = load(FixedSampler(np.array([[4, 5, 6]])), moved)
    assert batch.valid.tolist() == [True, False, True]
    assert len(batch.faults) == 1
    assert "dog-1" in batch.faults[0]
    assert torch.equal(batch.visual[[0, 2]], load(FixedSampler(np.array([[4, 6]])), clips)[0].visual)


def test_a_shard_cut_at_a_block_loses_only_what_was_cut_off(features: Manifest) -> None:
    whole = load(FixedSampler(np.array([[0, 1, 2, 3, 4]])), features)[0]
    shard, path = features.shards[0], Path(features.url(0))
    block = int(shard.offsets["visual.npy"][2]) // 512 * 512  # the header of clip 2 is still there, its bytes are not
    path.write_bytes(path.read_bytes()[:block])
    (batch,) = load(FixedSampler(np.array([[0, 1, 2, 3, 4]])), features)
    assert batch.valid.tolist() == [True, True, False, False, True]
    assert [key in fault for key, fault in zip(shard.keys[2:], batch.faults, strict=True)] == [True, True]
    assert all(str(path) in fault for fault in batch.faults)
    assert torch.equal(batch.visual[[0, 1, 4]], whole.visual[[0, 1, 4]])


def test_a_missing_shard_makes_a_fault_of_each_of_its_clips(features: Manifest) -> None:
    Path(features.url(1)).unlink()
    (batch,) = load(FixedSampler(np.array([[3, 4, 5, 8]])), features)
    assert batch.valid.tolist() == [True, False, False, True]
    assert [features.key(clip) in fault for clip, fault in zip((4, 5), batch.faults, strict=True)] == [True, True]


def test_a_batch_of_damaged_clips_keeps_its_shape(features: Manifest) -> None:
    for number in range(len(features.shards)):
        Path(features.url(number)).write_bytes(bytes(100_000))
    batches = load(training(features, exemplars=3), features)
    assert len(batches) == 8
    for batch in batches:
        assert batch.visual.shape == (6, 2, 3, 16)
        assert batch.audio.shape == (6, 16)
        assert not batch.valid.any()
        assert not batch.visual.any()
        assert len(batch.faults) == 6


def test_features_of_another_shape_are_a_fault(features: Manifest) -> None:
    other = replace(features, shape=features.shape | {"dim": 17})
    (batch,) = load(FixedSampler(np.array([[0, 1]])), other)
    assert not batch.valid.any()
    assert "not features of (2, 3, 17) and (17,)" in batch.faults[0]


def test_a_wrong_byte_in_a_header_never_stops_the_loader(features: Manifest) -> None:
    path, shard = Path(features.url(0)), features.shards[0]
    whole, start = path.read_bytes(), int(shard.offsets["visual.npy"][1])
    for place, value in itertools.product(range(start, start + 90), tuple(b"\0(9'")):
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        (batch,) = load(FixedSampler(np.array([[0, 1]])), features)
        assert batch.valid[0]
        assert bool(batch.valid[1]) == (not batch.faults)
        assert "\n" not in "".join(batch.faults)


def test_clips_are_read_from_any_filesystem(features: Manifest, tmp_path: Path) -> None:
    root = f"memory:/{tmp_path}"
    storage.write_bytes(f"{root}/{features.shards[0].url}", storage.read_bytes(features.url(0)))
    far, near = (
        load(FixedSampler(np.array([[1, 4]])), manifest)[0] for manifest in (replace(features, root=root), features)
    )
    assert torch.equal(far.visual[0], near.visual[0])
    assert far.valid.tolist() == [True, False]
    assert re.search(r"memory:/.*clip train-000-00004: missing", far.faults[0])
    storage.remove_tree(root)


def test_the_thread_that_reads_ahead_has_one_thread_of_torch_and_all_others_what_was_set() -> None:
    def batches() -> Iterator[Any]:
        yield torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert list(loader._prefetched(batches(), torch.device("cpu"))) == [1]
        with ThreadPoolExecutor(1) as new:
            assert (torch.get_num_threads(), new.submit(torch.get_num_threads).result()) == (2, 2)
    finally:
        torch.set_num_threads(before)
