import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avcil_dist import storage
from avcil_dist.data.clip_table import ClipTable
from avcil_dist.data.manifest import Manifest, check_shards, load_manifest
from avcil_dist.data.shard import Shard, check_keys
from avcil_dist.errors import ConfigError, DataError
from data_shards.random_features import make_feature_shards
from tests.helpers.old_manifests import save_old


@pytest.fixture
def old_url(url: str) -> str:
    """The same data set with a manifest of format 1."""
    save_old(load_manifest(url), url)
    return url


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Three classes; per class two training shards (4 and 2 clips) and a test shard (1 clip)."""
    return make_feature_shards(tmp_path / "data", classes=3, clips={"train": 6, "test": 1}, clips_per_shard=4)


def test_a_manifest_comes_back_as_it_was_saved(url: str, tmp_path: Path) -> None:
    manifest = load_manifest(url)
    manifest.save(f"{tmp_path}/data/again.json")
    again = load_manifest(f"{tmp_path}/data/again.json")
    assert (again.kind, again.classes, again.shape, again.root) == (
        "feature",
        ("class_000", "class_001", "class_002"),
        {"frames": 2, "positions": 3, "dim": 16},
        f"{tmp_path}/data",
    )
    assert again.content_hash == manifest.content_hash
    assert [shard.to_dict() for shard in again.shards] == [shard.to_dict() for shard in manifest.shards]
    assert storage.read_bytes(f"{tmp_path}/data/again.json") == storage.read_bytes(url)


def test_offsets_and_sizes_find_the_members_in_the_tar(url: str) -> None:
    manifest = load_manifest(url)
    for number, shard in enumerate(manifest.shards):
        content = storage.read_bytes(manifest.url(number))
        for row in range(shard.count):
            start, size = int(shard.offsets["json"][row]), int(shard.sizes["json"][row])
            record = json.loads(content[start : start + size])
            assert (record["source"], record["label"]) == (shard.keys[row], shard.class_name)


def test_the_content_hash_does_not_depend_on_the_folder(url: str, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "copy")
    copy = load_manifest(f"{tmp_path}/elsewhere/copy/manifest.json")
    assert copy.content_hash == load_manifest(url).content_hash
    assert copy.url(0).startswith(f"{tmp_path}/elsewhere/copy/train/")
    assert len(storage.read_bytes(copy.url(0))) == copy.shards[0].bytes


def test_the_content_hash_depends_on_the_content(url: str) -> None:
    manifest = load_manifest(url)
    first = manifest.shards[0]
    moved = replace(first, table=ClipTable.of(first.keys, first.sizes, first.sizes))
    others = [
        replace(manifest, classes=manifest.classes[::-1]),
        replace(manifest, shards=manifest.shards[::-1]),
        replace(manifest, shards=(replace(first, sha256="0" * 64), *manifest.shards[1:])),
        replace(manifest, shards=(moved, *manifest.shards[1:])),
        replace(manifest, shape={"dim": 17}),
    ]
    assert len({manifest.content_hash, *(other.content_hash for other in others)}) == 1 + len(others)


def _set(document: dict[str, Any], *path: str | int, value: Any) -> None:
    *parents, last = path
    node: Any = document
    for key in parents:
        node = node[key]
    node[last] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda d: _set(d, "shards", 0, "keys", 0, value="other"),
        lambda d: _set(d, "shards", 0, "members", "visual.npy", 0, 1, value=1024),
        lambda d: d["classes"].reverse(),
        lambda d: d["shards"].pop(),
        lambda d: d.update(content_hash="0" * 64),
    ],
    ids=["key", "offset", "order-of-classes", "shard-taken-out", "hash"],
)
def test_an_old_manifest_changed_by_hand_is_refused(old_url: str, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(storage.read_bytes(old_url))
    change(document)
    storage.write_json(old_url, document)
    with pytest.raises(DataError, match=r"manifest\.json: its content does not match its hash"):
        load_manifest(old_url)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: _set(d, "shards", 0, "sha256", value="0" * 64),
        lambda d: _set(d, "clips", "sha256", value="0" * 64),
        lambda d: _set(d, "clips", "columns", "offset.json", "offset", value=64),
        lambda d: d["classes"].reverse(),
        lambda d: d["shards"].pop(),
        lambda d: d.update(content_hash="0" * 64),
        lambda d: d.update(hash="0" * 64),
    ],
    ids=["shard", "table", "column", "order-of-classes", "shard-taken-out", "content-hash", "hash"],
)
def test_a_manifest_changed_by_hand_is_refused(url: str, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(storage.read_bytes(url))
    storage.write_json(url, document)
    load_manifest(url)  # spelled in another way
    change(document)
    storage.write_json(url, document)
    with pytest.raises(DataError, match=r"manifest\.json: its content does not match its hash"):
        load_manifest(url)


def test_a_manifest_of_format_1_is_the_same_data_set(url: str, tmp_path: Path) -> None:
    manifest = load_manifest(url)
    save_old(manifest, f"{tmp_path}/data/old.json")
    old = load_manifest(f"{tmp_path}/data/old.json")
    assert old.content_hash == manifest.content_hash
    assert [shard.to_dict() for shard in old.shards] == [shard.to_dict() for shard in manifest.shards]
    everything = np.arange(int(old.first_clips[-1]))
    for member in manifest.shards[0].members:
        np.testing.assert_array_equal(old.spans(member, everything), manifest.spans(member, everything))
    old.save(f"{tmp_path}/data/new.json")
    assert storage.read_bytes(f"{tmp_path}/data/new.json") == storage.read_bytes(url)


def test_the_identity_of_a_data_set_stays_the_same_in_every_version(url: str) -> None:
    assert (
        load_manifest(url).content_hash  # as the releases with format 1 computed it
        == replace(load_manifest(url)).content_hash
        == "b9da3292ac8d87a82ef3cb8b5b352647a66b9b8958dc331f9c0d7f7942faa977"
    )


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_cut_manifest_is_refused(url: str, kept: int) -> None:
    storage.write_bytes(url, storage.read_bytes(url)[:kept])
    with pytest.raises(DataError, match=r"manifest\.json: not valid JSON"):
        load_manifest(url)


@pytest.mark.parametrize(
    ("document", "number"), [([], 2), ({}, 2), ({"format": 1}, 1), ({"format": 2}, 2), ({"format": 3}, 2), ("x", 2)]
)
def test_json_that_is_no_manifest_is_refused(url: str, document: Any, number: int) -> None:
    storage.write_json(url, document)
    with pytest.raises(DataError, match=rf"not a manifest of format {number} \(.*\); restore it, or make one with"):
        load_manifest(url)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("shards"),
        lambda d: _set(d, "shards", value=3),
        lambda d: d["shards"][0].pop("members"),
        lambda d: _set(d, "shards", 0, "members", "visual.npy", value=[["x"], [1]]),
        lambda d: _set(d, "shards", 0, "members", value=[1]),
        lambda d: _set(d, "shards", 0, "members", "visual.npy", value=[[1]]),
    ],
    ids=["no-shards", "shards-a-number", "no-members", "offset-a-word", "members-a-list", "no-sizes"],
)
def test_an_old_manifest_of_wrong_shape_is_refused_in_one_line(
    old_url: str, change: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(storage.read_bytes(old_url))
    change(document)
    storage.write_json(old_url, document)
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest of format 1 \(shards") as caught:
        load_manifest(old_url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: _set(d, "shards", 0, "bytes", value=-1), "shards.0.bytes: Input should be greater"),
        (lambda d: _set(d, "shards", 0, "bytes", value=1 << 63), "shards.0.bytes: Input should be less"),
        (lambda d: _set(d, "shards", 0, "bytes", value=100), "is beyond the shard's 100 bytes"),
        (lambda d: _set(d, "shards", 0, "members", "json", 1, 1, value=10**11), "json: an offset or size is beyond"),
        (lambda d: _set(d, "shards", 0, "members", "json", 0, 1, value=5), "json: an offset or size is beyond"),
        (lambda d: _set(d, "shards", 0, "members", "json", 0, 1, value=1.5), "members.json.0.1: "),
        (lambda d: _set(d, "shards", 0, "members", "json", 0, 1, value="512"), "members.json.0.1: "),
        (lambda d: d["shards"][0]["members"]["json"][1].pop(), "4 clips, but 4 offsets of json"),
        (lambda d: d["shards"][0]["members"].pop("audio.npy"), "has no member audio.npy"),
        (lambda d: _set(d, "shards", 0, "count", value=3), "count 3, but 4 different keys"),
        (lambda d: _set(d, "shards", 0, "keys", 1, value=d["shards"][0]["keys"][0]), "count 4, but 3 different keys"),
        (lambda d: _set(d, "shards", 0, "keys", 1, value="a\nb"), "clip key 'a\\nb'; keys are letters"),
        (lambda d: _set(d, "shards", 0, "class", value="nobody"), "its class 'nobody' is none of the manifest's"),
        (lambda d: _set(d, "shards", 0, "split", value="dev"), "shards.0.split: Input should be 'train'"),
        (lambda d: _set(d, "kind", value="frames"), "kind: Input should be 'clip' or 'feature'"),
        (lambda d: _set(d, "kind", value="clip"), "has no member mp4"),
        (lambda d: _set(d, "shape", value={}), "features have frames, positions and dim"),
        (lambda d: _set(d, "shape", "dim", value=1 << 40), "shape.dim: Input should be less"),
        (lambda d: _set(d, "classes", 1, value=d["classes"][0]), "a class is listed twice"),
        (lambda d: _set(d, "classes", 1, value="dog\x1b[2J"), "classes.1: String should match"),
        (lambda d: _set(d, "shards", 0, "sha256", value="../victim/secret"), "shards.0.sha256: String should match"),
        (lambda d: _set(d, "shards", 0, "url", value="../a.tar"), "'../a.tar': not a plain path below the folder"),
        (lambda d: d["shards"].append(d["shards"][0]), "listed twice, so its clips would count twice"),
        (lambda d: d["shards"].append({**d["shards"][0], "url": "b.tar"}), "b.tar: listed twice"),
    ],
)  # fmt: skip
def test_a_value_that_no_shard_can_have_is_refused_in_one_line(
    old_url: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = json.loads(storage.read_bytes(old_url))
    change(document)
    storage.write_json(old_url, document)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_manifest(old_url)
    assert str(caught.value).startswith(f"{old_url}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"shards":' * 100_000, '{"format": 1, "classes": ["\\ud800"]}'])
def test_json_that_no_parser_should_follow_is_refused(url: str, text: str) -> None:
    storage.write_bytes(url, text.encode())
    with pytest.raises(DataError, match=r"manifest\.json: not valid JSON"):
        load_manifest(url)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: missing$"):
        load_manifest(f"{tmp_path}/manifest.json")


def test_clips_are_numbered_through_the_shards(url: str) -> None:
    manifest = load_manifest(url)
    assert manifest.first_clips.tolist() == [0, 4, 6, 7, 11, 13, 14, 18, 20, 21]
    keys = [key for shard in manifest.shards for key in shard.keys]
    for clip, key in enumerate(keys):
        number, row = manifest.locate(clip)
        assert manifest.shards[number].keys[row] == manifest.key(clip) == key
        assert manifest.class_of(clip) == manifest.shards[number].class_name
    assert manifest.locate(3) == (0, 3)
    assert manifest.locate(4) == (1, 0)


def test_clips_of_a_class_and_split_are_found(url: str) -> None:
    manifest = load_manifest(url)
    assert manifest.clips(["class_001"], "train").tolist() == [7, 8, 9, 10, 11, 12]
    assert manifest.clips(["class_002", "class_000"], "test").tolist() == [6, 20]
    assert manifest.clips(["class_000"], "val").tolist() == []
    assert manifest.clips([], "train").dtype == np.int64
    assert manifest.shard_numbers(["class_000", "class_002"], "train") == [0, 1, 6, 7]


def test_clip_numbers_follow_the_keys_and_name_a_stranger(url: str) -> None:
    manifest = load_manifest(url)
    assert manifest.clip_numbers("class_001", ["train-001-00005", "train-001-00000"]).tolist() == [12, 7]
    assert manifest.clip_numbers("class_001", []).tolist() == []
    for stranger in ("train-000-00000", "test-001-00000", "x"):
        with pytest.raises(DataError, match=f"class 'class_001' has no clip '{stranger}'"):
            manifest.clip_numbers("class_001", ["train-001-00000", stranger])


def test_shards_that_are_missing_or_of_another_size_are_named(url: str) -> None:
    manifest = load_manifest(url)
    everything = range(len(manifest.shards))
    check_shards(manifest, everything)
    cut = Path(manifest.url(1))
    cut.write_bytes(cut.read_bytes()[:512])
    Path(manifest.url(3)).unlink()
    check_shards(manifest, [0, 2, 4])
    with pytest.raises(DataError, match=rf"{cut}: 512 bytes, the manifest has \d+; restore the shards"):
        check_shards(manifest, [0, 1, 2])
    with pytest.raises(DataError, match=rf"{manifest.url(3)}: missing; restore the shards"):
        check_shards(manifest, [3])
    with pytest.raises(DataError, match=r"512 bytes, the manifest has \d+ \(and 1 more\); restore the shards"):
        check_shards(manifest, everything)
    longer = Path(manifest.url(2))
    longer.write_bytes(longer.read_bytes() + b"x")
    with pytest.raises(DataError, match=rf"{longer}: \d+ bytes, the manifest has \d+; restore the shards"):
        check_shards(manifest, [2])


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "../a", "a b", "é", "a\n", "a:b"])
def test_a_key_that_a_tar_must_not_have_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="x: clip key "):
        check_keys("x", ["fine_1-A", key])
    spans = {"mp4": np.array([512])}
    shard = Shard.of("a.tar", "dog", "train", 2000, "0" * 64, (key,), spans, spans)
    Manifest("clip", ("dog",), (shard,), {}).save(f"{tmp_path}/m.json")
    with pytest.raises(DataError, match=r"m\.json: damaged manifest: a\.tar: clip key "):
        load_manifest(f"{tmp_path}/m.json")


@pytest.mark.parametrize("command", ["touch MARKER", "touch MARKER; curl http://host/x"])
def test_a_pipe_url_is_refused_and_runs_nothing(tmp_path: Path, command: str) -> None:
    marker = tmp_path / "ran"
    spans = {"mp4": np.array([512])}
    pipe = "pipe:" + command.replace("MARKER", str(marker))
    Manifest("clip", ("dog",), (Shard.of(pipe, "dog", "train", 2000, "0" * 64, ("k",), spans, spans),), {}).save(
        f"{tmp_path}/m.json"
    )
    with pytest.raises(DataError, match="not a plain path below"):
        check_shards(load_manifest(f"{tmp_path}/m.json"), [0])
    with pytest.raises(ConfigError, match="pipe urls run shell commands and are refused"):
        load_manifest(pipe)
    assert not marker.exists()
