import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from click.testing import CliRunner

from avcil_dist.config.schema import ClipConfig, DataConfig
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.errors import ConfigError, DataError
from data_shards.build import build_shards
from data_shards.importers.webdataset_tars import import_tars
from data_shards.listings.listing import read_class_names
from data_shards.verify import verify_shards
from launch.cli.shards import shards
from tests.helpers.media import media
from tests.helpers.rendered import render_tiny, tiny_clip
from tests.helpers.tars import write_tar


def _json(label: str, split: str = "train") -> bytes:
    return json.dumps({"label": label, "split": split}).encode()


def test_tars_written_by_webdataset_are_imported_and_read(tmp_path: Path) -> None:
    for label in ("dog", "cat"):
        with wds.TarWriter(f"{tmp_path}/{label}.tar") as writer:
            for i in range(2):
                writer.write(
                    {"__key__": f"{label}{i}", "mp4": tiny_clip(0, i), "json": {"label": label, "split": "test"}}
                )
    urls = [f"{tmp_path}/dog.tar", f"{tmp_path}/cat.tar"]
    manifest = import_tars(urls, f"{tmp_path}/manifest.json")
    loaded = load_manifest(f"{tmp_path}/manifest.json")
    assert loaded.content_hash == manifest.content_hash
    assert loaded.classes == ("dog", "cat")
    assert [(s.url, s.split, s.keys) for s in loaded.shards] == [
        ("dog.tar", "test", ("dog0", "dog1")),
        ("cat.tar", "test", ("cat0", "cat1")),
    ]
    assert verify_shards(f"{tmp_path}/manifest.json") == []
    data = DataConfig(manifest="x", decode_workers=0, clip=ClipConfig(frames=2, size=32, mel_bins=32, mel_frames=32))
    source = FixedSampler(loaded.clips(["cat"], "test")[None])
    (batch,) = load_batches(source, manifest=loaded, labels={"cat": 1}, data=data)
    assert batch.faults == ()
    assert batch.labels.tolist() == [1, 1]


@pytest.mark.slow
def test_import_of_built_shards_gives_their_manifest(tmp_path: Path) -> None:
    built = build_shards(
        render_tiny(tmp_path / "clips"), f"{tmp_path}/out", clips_per_shard=2, min_seconds=0.5
    ).manifest
    urls = [built.url(number) for number in range(len(built.shards))]
    assert import_tars(urls, f"{tmp_path}/out/index.json").content_hash == built.content_hash
    assert import_tars(urls, f"{tmp_path}/out/two.json", processes=2).content_hash == built.content_hash


def test_a_tar_that_is_not_below_the_folder_of_the_manifest_is_refused(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", {"x.mp4": b"1", "x.json": _json("dog")})
    with pytest.raises(ConfigError, match=r"a\.tar: not below .*/m, the folder of the manifest"):
        import_tars([url], f"{tmp_path}/m/manifest.json")
    assert not (tmp_path / "m").exists()


def test_class_numbers_get_names_and_the_split_is_given(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", {"x.mp4": b"1", "x.cls": b"1", "y.mp4": b"22", "y.cls": b"1"})
    named = import_tars([url], f"{tmp_path}/named.json", split="train", classes=["dog", "cat"])
    assert named.classes == ("cat",)
    assert verify_shards(f"{tmp_path}/named.json") == []
    assert import_tars([url], f"{tmp_path}/numbered.json", split="train").classes == ("class_001",)
    with pytest.raises(DataError, match="give --split"):
        import_tars([url], f"{tmp_path}/none.json")


def test_metadata_without_split_is_verified_by_its_label(tmp_path: Path) -> None:
    files = {"x.mp4": b"1", "x.json": b'{"label": 7}', "y.mp4": b"22", "y.json": b'{"label": 7}'}
    url = write_tar(tmp_path / "a.tar", files)
    assert import_tars([url], f"{tmp_path}/m.json", split="train").classes == ("7",)
    assert verify_shards(f"{tmp_path}/m.json") == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"x.mp4": b"", "x.json": _json("dog"), "y.mp4": b"", "y.json": _json("cat")},
            r"more than one label \(cat, dog\)",
        ),
        ({"x.mp4": b"", "x.json": _json("dog"), "y.mp4": b"", "y.json": _json("dog", "val")}, "more than one split"),
        ({"x.mp4": b"", "x.json": b'{"other": 1}'}, "no json or cls with its class"),
        ({"x.avi": b"", "x.json": _json("dog")}, "has no mp4"),
        ({"x.mp4": b"", "x.json": b"{"}, "x.json: not valid JSON"),
        ({"a b.mp4": b"", "a b.json": _json("dog")}, "keys are letters"),
        ({"d/x.mp4": b"", "d/x.json": _json("dog")}, "keys are letters"),
        ({"x.mp4": b"", "x.json": _json("dog"), "x.txt": b"", "y.mp4": b"", "y.json": _json("dog")}, "other members"),
        ({}, "no clip in it"),
    ],
)
def test_tar_that_is_no_clip_shard_is_refused(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    url = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=words) as raised:
        import_tars([url], f"{tmp_path}/manifest.json")
    if "more than one" in words or "one label" in words:
        assert "avcil shards build" in str(raised.value)
    assert not (tmp_path / "manifest.json").exists()


def test_compressed_missing_and_repeated_tars_are_refused(tmp_path: Path) -> None:
    files = {"x.mp4": bytes(1000), "x.json": _json("dog")}
    with pytest.raises(DataError, match="not a tar, or cut or compressed"):
        import_tars([write_tar(tmp_path / "a.tar.gz", files, "w:gz")], f"{tmp_path}/manifest.json")
    with pytest.raises(DataError, match="missing"):
        import_tars([f"{tmp_path}/gone.tar"], f"{tmp_path}/manifest.json")
    urls = [write_tar(tmp_path / "a.tar", files), write_tar(tmp_path / "b.tar", files)]
    with pytest.raises(DataError, match=r"clip 'x' is in a\.tar too"):
        import_tars(urls, f"{tmp_path}/manifest.json")
    cut = Path(urls[0])
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(DataError, match="not a tar, or cut"):
        import_tars(urls[:1], f"{tmp_path}/manifest.json")


def test_manifest_is_never_overwritten(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", {"x.mp4": b"", "x.json": _json("dog")})
    import_tars([url], f"{tmp_path}/manifest.json")
    with pytest.raises(ConfigError, match="the manifest exists already"):
        import_tars([url], f"{tmp_path}/manifest.json")


@pytest.mark.slow
def test_command_writes_the_manifest(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", {"x.mp4": b"", "x.cls": b"0"})
    (tmp_path / "names.txt").write_text("dog\n")
    words = [url, "--split", "val", "--classes", f"{tmp_path}/names.txt", "--output", f"{tmp_path}/m.json"]
    result = CliRunner().invoke(shards, ["import-tars", *words, "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert "1 clips, 1 classes, 1 shards" in result.output
    assert load_manifest(f"{tmp_path}/m.json").classes == ("dog",)


def test_tars_of_other_tools_are_imported_by_their_visible_names(tmp_path: Path) -> None:
    clip = tiny_clip()
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfdog\r\ncat\r\n")
    tars = {
        "dot": {"./k1.cls": b"0\n", "./k1.mp4": clip},
        "mac": {"._k1.cls": bytes(163), "k1.cls": b"0\n", "._k1.mp4": bytes(163), "k1.mp4": clip, ".DS_Store": b"x"},
    }
    for name, files in tars.items():
        url = write_tar(tmp_path / f"{name}.tar", files)
        names = read_class_names(tmp_path / "names.txt")
        manifest = import_tars([url], f"{tmp_path}/{name}.json", split="train", classes=names)
        assert manifest.classes == ("dog",)
        assert manifest.shards[0].keys == ("k1",)
        assert verify_shards(f"{tmp_path}/{name}.json") == []
        data = DataConfig(
            manifest="x", decode_workers=0, clip=ClipConfig(frames=2, size=32, mel_bins=32, mel_frames=32)
        )
        sampler = FixedSampler(manifest.clips(["dog"], "train")[None])
        (batch,) = load_batches(sampler, manifest=manifest, labels={"dog": 1}, data=data)
        assert batch.faults == ()


def test_damaged_clip_of_an_imported_tar_is_skipped_and_named(tmp_path: Path) -> None:
    clips = {"good": tiny_clip(), "many": media("mp4", seconds=1, rate=48_000, layout="7.1"), "bad": _nan_clip()}
    files = {f"{key}.{ending}": data for key, clip in clips.items() for ending, data in (("mp4", clip), ("cls", b"0"))}
    manifest = import_tars([write_tar(tmp_path / "a.tar", files)], f"{tmp_path}/m.json", split="train")
    data = DataConfig(
        decode_workers=0,
        manifest="x",
        max_bad_fraction=0.9,
        clip=ClipConfig(frames=2, size=32, mel_bins=32, mel_frames=32),
    )
    sampler = FixedSampler(manifest.clips(["class_000"], "train")[None])
    (batch,) = load_batches(sampler, manifest=manifest, labels={"class_000": 0}, data=data)
    assert batch.valid.tolist() == [True, True, False]
    assert batch.faults == ("bad: its sound has values that are no number",)


def _nan_clip() -> bytes:
    samples = np.zeros(16_000, np.float32)
    samples[100] = np.nan
    return media("mov", seconds=1, sound="pcm_f32le", samples=samples)
