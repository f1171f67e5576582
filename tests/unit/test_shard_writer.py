import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError
from data_shards.random_features import make_feature_shards
from data_shards.shard_writer import shard_url, write_shard
from tests.helpers.rendered import tiny_clip

CLIPS = [
    (f"k{i}", {"mp4": bytes([i]) * (100 + 500 * i), "json": json.dumps({"label": "dog"}).encode()}) for i in range(3)
]


def _write(root: Path, clips: list[tuple[str, dict[str, bytes]]], url: str = "train/c000-dog-0000.tar"):
    return write_shard(url, root=str(root), class_name="dog", split="train", clips=clips)


def test_webdataset_reads_a_clip_shard(tmp_path: Path) -> None:
    clips = [("a_1-2", {"mp4": tiny_clip(), "json": b'{"label": "dog"}'})]
    shard = _write(tmp_path, clips)
    samples = list(wds.WebDataset(str(tmp_path / shard.url), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["a_1-2"]
    assert samples[0]["mp4"] == clips[0][1]["mp4"]
    assert samples[0]["json"] == {"label": "dog"}


def test_webdataset_reads_a_feature_shard(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path, classes=2, clips={"train": 20, "test": 2}, dim=8))
    assert (manifest.kind, manifest.shape) == ("feature", {"frames": 2, "positions": 3, "dim": 8})
    assert [shard.count for shard in manifest.shards] == [16, 4, 2, 16, 4, 2]
    samples = list(wds.WebDataset(manifest.url(0), shardshuffle=False).decode())
    assert len(samples) == 16
    assert samples[0]["visual.npy"].shape == (6, 8)
    assert samples[0]["audio.npy"].shape == (8,)
    assert samples[0]["audio.npy"].dtype == np.float16
    assert samples[0]["json"]["label"] == "class_000"


def test_offsets_and_sizes_find_each_members_bytes(tmp_path: Path) -> None:
    shard = _write(tmp_path, CLIPS)
    content = (tmp_path / shard.url).read_bytes()
    assert len(content) == shard.bytes
    for row, (key, members) in enumerate(CLIPS):
        assert shard.keys[row] == key
        for name, data in members.items():
            offset, size = shard.offsets[name][row], shard.sizes[name][row]
            assert content[offset : offset + size] == data


def test_equal_clips_give_equal_bytes_without_owner_or_time(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "a", CLIPS), _write(tmp_path / "b", CLIPS)
    assert first.sha256 == second.sha256
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "a" / first.url).read_bytes())) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "")}


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "../a", "a b", "ä"])
def test_unsafe_key_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="clip key"):
        _write(tmp_path, [(key, CLIPS[0][1])])
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'k0' is a duplicate"):
        _write(tmp_path, [CLIPS[0], CLIPS[1], CLIPS[0]])


def test_clips_with_different_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'k1' has members"):
        _write(tmp_path, [CLIPS[0], ("k1", {"mp4": b"x"})])


def test_empty_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one clip"):
        _write(tmp_path, [])


def test_key_too_long_for_a_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shorten the key"):
        _write(tmp_path, [("k" * 120, CLIPS[0][1])])


@pytest.mark.parametrize("url", ["pipe:cat x", "/abs.tar", "s3://b/x.tar", "../x.tar"])
def test_url_outside_the_root_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError):
        _write(tmp_path, CLIPS, url)


def test_pipe_root_is_refused() -> None:
    with pytest.raises(ConfigError, match="pipe"):
        write_shard("x.tar", root="pipe:cat", class_name="dog", split="train", clips=CLIPS)


def test_shard_url_is_safe_for_any_class_name() -> None:
    assert shard_url("train", 3, "bird chirping, tweeting", 0) == "train/c003-bird_chirping_tweeting-0000.tar"
    assert shard_url("test", 12, "../é", 7) == "test/c012--0007.tar"
