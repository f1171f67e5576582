"""Tars in which classes are mixed become shards by class and split: whole, by parts, after a kill, from any url."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest
from avcil_dist.errors import ConfigError, DataError, StorageError
from data_shards.build import BuildSettings, build_listing, build_listing_part
from data_shards.build_plan import WHOLE, BuildReport, Part, merge_parts
from data_shards.clip_bytes import read_clip
from data_shards.listings.listing import Listing
from data_shards.listings.mixed_tars import BY_PATH, SampleRules, read_mixed_tars
from data_shards.listings.splits import SplitShares
from data_shards.repack import list_for_repack
from data_shards.tar_files import expand_urls, indexed_members
from data_shards.verify import verify_shards
from launch.cli.shards import shards
from tests.helpers.media import media
from tests.helpers.rendered import remuxed, tiny_clip
from tests.helpers.tars import write_tar

torch.set_num_threads(1)

SETTINGS = BuildSettings(clips_per_shard=2, min_seconds=0.5, keep_muted=True)
CLIPS = [tiny_clip(number, index) for number in range(2) for index in range(2)]


def _json(**values: object) -> bytes:
    return json.dumps(values).encode()


def mixed_tars(folder: Path, *, tars: int = 3, split: bool = False) -> list[str]:
    """Tars with two classes each, and keys that begin anew in each; clip `index` is of video `index // 2`."""
    urls = []
    for number in range(tars):
        files = {}
        for index in range(4):
            label = ("dog", "cat")[index % 2]
            splits = {"split": ("train", "test", "validation")[number]} if split else {}
            files[f"{index:04d}.mp4"] = CLIPS[index]
            files[f"{index:04d}.json"] = _json(label=label, video_id=f"v{number}-{index // 2}", caption="x", **splits)
            files[f"{index:04d}.txt"] = b"a caption"
        urls.append(write_tar(folder / f"{number:05d}.tar", files))
    return urls


def _listing(*urls: str, split: SplitShares | str | None = None, **rules: object) -> Listing:
    return read_mixed_tars(urls, SampleRules(**rules), split)  # type: ignore[arg-type]


def _repack(urls: list[str], output: str, part: Part = WHOLE, **rules: object) -> BuildReport | None:
    listing = list_for_repack(urls, output, part, rules=SampleRules(**rules), split=None)  # type: ignore[arg-type]
    if part.is_whole:
        return build_listing(listing, output, SETTINGS)
    return build_listing_part(listing, output, part, SETTINGS)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _counts(manifest: Manifest) -> Counter[tuple[str, str]]:
    counts = Counter[tuple[str, str]]()
    for shard in manifest.shards:
        counts[shard.class_name, shard.split] += shard.count
    return counts


def test_mixed_tars_become_shards_by_class_and_split(tmp_path: Path) -> None:
    report = _repack(mixed_tars(tmp_path / "tars", split=True), f"{tmp_path}/out")
    assert report is not None
    assert report.rejected == ()
    assert report.manifest.classes == ("dog", "cat")
    splits = {(label, split): 2 for label in ("dog", "cat") for split in ("train", "val", "test")}
    assert _counts(report.manifest) == splits
    assert verify_shards(report.manifest_url) == []
    shard = report.manifest.shards[0]
    data = (tmp_path / "out" / shard.url).read_bytes()
    place = shard.offsets["mp4"][1], shard.sizes["mp4"][1]
    assert data[place[0] : sum(place)] == CLIPS[2]
    assert json.loads(data[shard.offsets["json"][1] :][: shard.sizes["json"][1]])["source"] == "v0-1"
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "out").iterdir()) == [
        "build.json", "clips", "manifest.json", "rejected.csv", "test", "train", "val",
    ]  # fmt: skip


def test_clips_without_splits_are_split_by_source_within_each_class(tmp_path: Path) -> None:
    urls = mixed_tars(tmp_path / "tars")
    rows = _listing(*urls).rows
    by_source = {
        row.clip.source: {other.split for other in rows if other.clip.source == row.clip.source} for row in rows
    }
    assert len(by_source) == 6
    assert all(len(splits) == 1 for splits in by_source.values())
    assert {(row.label, row.split) for row in rows} == {
        (a, b) for a in ("dog", "cat") for b in ("train", "val", "test")
    }
    assert {row.split for row in _listing(*urls, split=SplitShares(0, 0, 1)).rows} == {"test"}
    renamed = [
        write_tar(tmp_path / word / "0.tar", {"0.mp4": CLIPS[0], "0.cls": b"a"}) for word in ("train", "x-val", "test")
    ]
    assert [row.split for row in _listing(*renamed, split=BY_PATH).rows] == ["train", "val", "test"]
    url = f"memory://{uuid.uuid4().hex}/0.tar"
    storage.upload(renamed[0], url)
    with pytest.raises(DataError, match="no word train, val, validation or test"):
        _listing(url, split=BY_PATH)


def test_keys_that_begin_anew_in_each_tar_stay_apart_and_are_the_same_elsewhere(tmp_path: Path) -> None:
    keys = [row.clip.key for row in _listing(*mixed_tars(tmp_path / "tars", split=True)).rows]
    moved = [row.clip.key for row in _listing(*mixed_tars(tmp_path / "elsewhere/else", split=True)).rows]
    assert keys == moved
    whole = _listing(*mixed_tars(tmp_path / "whole"), split=SplitShares(1, 0, 0)).rows
    assert len({(row.label, row.clip.key) for row in whole}) == 12


def test_merged_parts_equal_a_single_repack(tmp_path: Path) -> None:
    urls = mixed_tars(tmp_path / "tars")
    _repack(urls, f"{tmp_path}/whole")
    for index in (1, 0, 2):
        assert _repack(urls, f"{tmp_path}/parts", Part(index, 3)) is None
    assert len(list((tmp_path / "parts/parts/indexes").iterdir())) == 3
    merge_parts(f"{tmp_path}/parts")
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")
    again = _repack(urls, f"{tmp_path}/parts", Part(1, 3))
    assert again is not None
    assert again.unchanged
    assert not (tmp_path / "parts/parts").exists()


def test_saved_index_is_read_in_place_of_the_tar_until_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, saved, read = mixed_tars(tmp_path / "tars"), str(tmp_path / "saved"), list[str]()

    def members(url: str, wanted: tuple[str, ...]) -> object:
        read.append(url)
        return indexed_members(url, wanted)

    monkeypatch.setattr("data_shards.listings.mixed_tars.indexed_members", members)
    first = read_mixed_tars(urls, SampleRules(), saved=saved)
    assert sorted(read) == urls
    assert read_mixed_tars(urls, SampleRules(), saved=saved) == first
    assert len(read) == 3
    write_tar(Path(urls[0]), {"new.mp4": CLIPS[0], "new.cls": b"dog"})
    assert len(read_mixed_tars(urls, SampleRules(), saved=saved).rows) == 9
    assert read[3:] == urls[:1]
    read_mixed_tars(urls, SampleRules(label="caption"), saved=saved)
    assert len(read) == 7
    for path in (tmp_path / "saved").iterdir():
        path.write_text("{}")
    read_mixed_tars(urls, SampleRules(), saved=saved)
    assert len(read) == 10


KILLED = """
import os, signal, sys
from data_shards.build import build_listing
from data_shards.build_plan import WHOLE
from data_shards.listings.mixed_tars import SampleRules
from data_shards.repack import list_for_repack
from tests.unit.test_repack import SETTINGS

def kill(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

listing = list_for_repack(sys.argv[2:], sys.argv[1], WHOLE, rules=SampleRules(), split=None)
build_listing(listing, sys.argv[1], SETTINGS, progress=kill)
"""


@pytest.mark.slow
def test_a_killed_repack_continues_to_the_same_bytes(tmp_path: Path) -> None:
    urls = mixed_tars(tmp_path / "tars")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", KILLED, f"{tmp_path}/out", *urls]
    assert subprocess.run(words, check=False, env=environment).returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("c*.tar")}
    assert 0 < len(done) < 8
    _repack(urls, f"{tmp_path}/out")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    _repack(urls, f"{tmp_path}/fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("texts", "rules", "label"),
    [
        ({"json": _json(label="cafe\u0301 ")}, {}, "caf\u00e9"),
        ({"cls": b" dog\r\n"}, {}, "dog"),
        ({"cls": b"\xef\xbb\xbf1\n"}, {}, "class_001"),
        ({"cls": b"1"}, {"classes": ("cat", "dog")}, "dog"),
        ({"json": _json(label=1), "cls": b"0"}, {"classes": ("cat", "dog")}, "dog"),
        ({"json": _json(a=1), "cls": b"dog"}, {}, "dog"),
        ({"txt": b"dog"}, {}, "dog"),
        ({"json": _json(label="cat"), "txt": b"dog"}, {"label": "txt"}, "dog"),
        ({"json": _json(label="cat", cls={"name": "dog"})}, {"label": "cls.name"}, "dog"),
        ({"json": _json(category="dog")}, {"label": "category"}, "dog"),
    ],
)
def test_the_class_is_found_in_each_form(
    tmp_path: Path, texts: dict[str, bytes], rules: dict[str, object], label: str
) -> None:
    files = {"./k.mp4": b"x"} | {f"./k.{ending}": data for ending, data in texts.items()} | {"._k.mp4": b"mac"}
    assert [row.label for row in _listing(write_tar(tmp_path / "a.tar", files), **rules).rows] == [label]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"k.mp4": b"", "k.json": _json(a=1, b=2)}, "no field 'label' in its json (fields: a, b); give --label"),
        ({"k.mp4": b"", "k.txt": b"dog", "k.json": _json(a=1)}, "no field 'label'"),
        ({"k.mp4": b"", "k.json": b"{"}, "not valid JSON"),
        ({"k.mp4": b"", "k.json": b"[" * 100_000}, "not valid JSON"),
        ({"k.mp4": b"", "k.json": b"[1]"}, "not an object"),
        ({"k.mp4": b"", "k.json": _json(label=["a", "b"])}, "a clip has one class"),
        ({"k.mp4": b"", "k.json": _json(label="a", split="dev")}, "split 'dev' is none of"),
        ({"k.mp4": b"", "k.json": _json(label=" ")}, "is empty"),
        ({"k.mp4": b"", "k.cls": b"\xff\xfe1"}, "cannot be read"),
        ({"k.mp4": b"", "k.cls": b"7"}, "class 7, but 1 names were given"),
        ({"k.mp4": b"", "k.json": _json(label=-1)}, "class -1, but 1 names were given"),
        ({"k.mp4": b""}, "no field 'label' in its json (fields: none)"),
        ({"k.jpg": b"", "k.cls": b"0"}, "no video among its members (cls, jpg)"),
        ({"k.mp4": b"", "k.json": bytes((1 << 22) + 1)}, "too many for metadata"),
    ],
)
def test_a_sample_that_cannot_be_used_is_rejected_by_name(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    url = write_tar(tmp_path / "a.tar", {"good.mp4": CLIPS[0], "good.cls": b"0"} | files)
    listing = _listing(url, classes=("dog",))
    assert [row.clip.key for row in listing.rows] == ["good"]
    [rejection] = listing.rejected
    assert rejection.path == f"{url}/k"
    assert words in rejection.reason


def test_clips_are_checked_and_converted_as_by_a_build(tmp_path: Path) -> None:
    webm = media("webm", seconds=1, codec="libvpx", sound="libopus", rate=48_000)
    clips = {
        "good.mp4": CLIPS[0],
        "web.webm": webm,
        "film.mkv": remuxed(CLIPS[0], container="matroska"),
        "mute.mp4": remuxed(CLIPS[0], sound=False),
        "cut.mp4": CLIPS[0][:2000],
        "two.mp4": b"text",
        "two.webm": webm,
    }
    labels = {f"{Path(name).stem}.cls": b"dog" for name in clips}
    report = _repack([write_tar(tmp_path / "a.tar", clips | labels | {"no.mp4": b""})], f"{tmp_path}/out")
    assert report is not None
    assert sorted(key for shard in report.manifest.shards for key in shard.keys) == ["film", "good", "two", "web"]
    found = {rejection.path.removeprefix(f"{tmp_path}/"): rejection.kind for rejection in report.rejected}
    assert found == {
        "a.tar/mute.mp4": "silent",
        "a.tar/cut.mp4": "corrupt",
        "a.tar/two.mp4": "corrupt",
        "a.tar/no": "format",
    }
    assert verify_shards(report.manifest_url) == []


def test_tars_are_read_from_urls_with_ranges_and_wildcards(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    for url in mixed_tars(tmp_path / "tars"):
        storage.upload(url, f"{root}/tars/{Path(url).name}")
    urls = [f"{root}/tars/{number:05d}.tar" for number in range(3)]
    assert expand_urls([f"{root}/tars/{{00000..00002}}.tar"]) == urls
    assert expand_urls([f"{root}/tars/*.tar"]) == urls
    assert expand_urls([f"{tmp_path}/tars/0000[01].tar"]) == [f"{tmp_path}/tars/0000{i}.tar" for i in range(2)]
    assert expand_urls(["a{9..10}-{0..1}"]) == ["a9-0", "a9-1", "a10-0", "a10-1"]
    report = _repack([f"{root}/tars/{{00000..00002}}.tar"], f"{root}/out")
    assert report is not None
    local = _repack([f"{tmp_path}/tars/*.tar"], f"{tmp_path}/out")
    assert local is not None
    assert report.manifest.content_hash == local.manifest.content_hash


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{5..1}.tar", "not a range"),
        ("{0..999999999999}.tar", "not a range"),
        ("{0..9999}{0..9999}.tar", "not a range"),
        ("/nowhere/*.tar", "no file matches"),
        ("http://host/a.tar", "not allowed"),
        ("pipe:cat", "pipe"),
        ("a{1..1}.tar", "given twice"),
    ],
)
def test_impossible_urls_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand_urls([pattern, "a1.tar"])


def test_tars_that_cannot_be_read_are_an_error_before_any_clip_is(tmp_path: Path) -> None:
    urls = mixed_tars(tmp_path / "tars")
    whole = Path(urls[1]).read_bytes()
    member = [member.offset for member in indexed_members(urls[1])][6] - 512
    for data in (whole[: member - 100], whole[:member], whole + whole, b"", b"text" * 500):
        Path(urls[1]).write_bytes(data)
        with pytest.raises(DataError, match=r"00001\.tar: not a tar, or cut or compressed"):
            _listing(*urls)
    Path(urls[2]).unlink()
    with pytest.raises(DataError, match="and 1 more tars cannot be read"):
        _listing(*urls)
    with pytest.raises(DataError, match="no sample in the tars"):
        _listing(write_tar(tmp_path / "hidden.tar", {"._a.mp4": b""}))


def test_a_tar_that_changes_during_the_build_ends_it(tmp_path: Path) -> None:
    url = mixed_tars(tmp_path / "tars")[0]
    file = _listing(url).rows[3].clip.files[0]
    assert read_clip(file) == CLIPS[3]
    Path(url).write_bytes(Path(url).read_bytes()[:5000])
    with pytest.raises(StorageError, match="the tar was changed or removed"):
        read_clip(file)


def test_a_split_in_some_jsons_only_is_a_rejection(tmp_path: Path) -> None:
    files = {"a.mp4": b"", "a.json": _json(label="dog", split="test"), "b.mp4": b"", "b.json": _json(label="dog")}
    listing = _listing(write_tar(tmp_path / "a.tar", files))
    assert [row.split for row in listing.rows] == ["test"]
    assert [(rejection.label, rejection.reason[:20]) for rejection in listing.rejected] == [
        ("dog", "no split in its json")
    ]


@pytest.mark.slow
def test_the_command_repacks_by_parts(tmp_path: Path) -> None:
    mixed_tars(tmp_path / "tars")
    words = ["repack", f"{tmp_path}/tars/{{00000..00002}}.tar", f"{tmp_path}/out", "--processes", "2"]
    for part in ("1/2", "2/2"):
        result = CliRunner().invoke(shards, [*words, "--part", part, "--split", "0.5,0.25,0.25"])
        assert result.exit_code == 0, result.output
        assert f"part {part} is done" in result.output
    result = CliRunner().invoke(shards, ["merge", f"{tmp_path}/out"])
    assert "12 clips, 2 classes" in result.output
    assert verify_shards(f"{tmp_path}/out/manifest.json") == []
