"""Tars whose headers claim more than is there: one line, at once."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from avcil_dist import storage
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import DataError
from data_shards.importers.webdataset_tars import import_tars
from data_shards.random_features import make_feature_shards
from data_shards.verify import verify_shards
from tests.helpers.hostile_tars import HOSTILE, member, tar_of

SECONDS = 5  # of processor


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(HOSTILE[name])
    started = time.process_time()
    with pytest.raises(DataError, match=r"a\.tar: ") as caught:
        import_tars([str(path)], f"{tmp_path}/manifest.json", split="train")
    assert time.process_time() - started < SECONDS
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_one_fault_of_a_data_set(tmp_path: Path, name: str) -> None:
    url = make_feature_shards(tmp_path, classes=1, clips={"train": 3}, dim=8)
    manifest = load_manifest(url)
    path, data = Path(manifest.url(0)), HOSTILE[name]
    data = data.ljust(path.stat().st_size, b"\0")  # the size that the manifest's offsets need
    path.write_bytes(data)
    shard = replace(manifest.shards[0], bytes=len(data), sha256=storage.sha256(data))
    replace(manifest, shards=(shard,)).save(url)
    started = time.process_time()
    faults = verify_shards(url)
    assert time.process_time() - started < SECONDS
    assert all(fault.startswith(str(path)) and len(fault.splitlines()) == 1 for fault in faults)
    assert faults


def test_a_clip_after_a_damaged_header_is_never_lost_in_silence(tmp_path: Path) -> None:
    clip = tar_of({"b.mp4": b"x", "b.json": b'{"label": "dog"}'})
    data = member("a.mp4", b"x") + member("a.json", b'{"label": "dog"}') + b"\x01" * 512 + clip
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar: not a tar, or cut"):
        import_tars([f"{tmp_path}/a.tar"], f"{tmp_path}/manifest.json", split="train")


@pytest.mark.parametrize("content", [b"\xff", b"3", b"9" * 5000, b'{"label": ""}'])
def test_metadata_that_is_none_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"a.mp4": b"x", "a.json": content}))
    with pytest.raises(DataError, match=r"a\.tar: ") as caught:
        import_tars([f"{tmp_path}/a.tar"], f"{tmp_path}/manifest.json", split="train")
    assert len(str(caught.value).splitlines()) == 1


def test_metadata_of_unusual_length_is_refused(tmp_path: Path) -> None:
    content = json.dumps({"label": "dog", "rest": "x" * (5 << 20)}).encode()
    (tmp_path / "a.tar").write_bytes(tar_of({"a.mp4": b"x", "a.json": content}))
    with pytest.raises(DataError, match=r"a\.json: \d+ bytes of metadata"):
        import_tars([f"{tmp_path}/a.tar"], f"{tmp_path}/manifest.json", split="train")
