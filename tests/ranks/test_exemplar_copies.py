"""Exemplars of far shards are copied to each machine once; the result is that of local shards."""

from pathlib import Path

import numpy as np
import torch

from avcil_dist.compose import load_config
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.training.exemplar_copies import RedirectedRequests, copy_clips, with_copies
from data_shards.random_features import make_feature_shards
from tests.helpers.streams import write_config


def test_copies_are_the_clips_under_other_numbers(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path / "shards", classes=3, clips={"train": 20}))
    exemplars = np.array([7, 2, 45, 41, 59])
    folder = tmp_path / "copies"
    folder.mkdir()
    copy_clips(manifest, exemplars, folder, seconds=1)
    joined, numbers = with_copies(manifest, load_manifest(f"{folder}/manifest.json"))
    assert sorted(numbers) == sorted(exemplars)
    assert set(numbers.values()) == set(range(60, 65))
    assert {shard.class_name for shard in joined.shards[-2:]} == {"class_000", "class_002"}
    assert len(list(folder.glob("*.bin"))) == 2

    source = FixedSampler(np.array([[1, 7, 45, 2], [59, 20, 41, 0]]))
    labels = {name: number for number, name in enumerate(manifest.classes)}
    data = load_config(str(write_config(tmp_path))).data
    originals = list(load_batches(source, manifest=manifest, labels=labels, data=data))
    for path in (tmp_path / "shards").rglob("*train*"):  # the originals are not read for what is copied
        if "class_002" in str(path):
            path.unlink()
    copies = list(load_batches(RedirectedRequests(source, numbers), manifest=joined, labels=labels, data=data))
    for original, copy in zip(originals, copies, strict=True):
        assert copy.valid.all()
        assert torch.equal(copy.visual, original.visual)
        assert torch.equal(copy.audio, original.audio)
        assert torch.equal(copy.labels, original.labels)


def test_a_clip_that_cannot_be_read_is_not_copied(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path / "shards", classes=2, clips={"train": 5}))
    Path(manifest.url(1)).unlink()
    copy_clips(manifest, np.array([0, 1, 7]), tmp_path, seconds=1)
    _, numbers = with_copies(manifest, load_manifest(f"{tmp_path}/manifest.json"))
    assert numbers == {0: 10, 1: 11}
