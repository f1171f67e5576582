"""Names of files and classes as they occur: keys, duplicates, further files, encodings, links."""

import csv
import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from avcil_dist.errors import DataError
from data_shards.build import BuildReport, build_shards
from data_shards.listings.listing import KEY_LENGTH, safe_key
from data_shards.listings.published_lists import read_published_lists
from data_shards.listings.read import read_listing
from data_shards.rejections import Rejection, rejection_table
from tests.helpers.media import media
from tests.helpers.published_forms import write_split_lists
from tests.helpers.rendered import remuxed, tiny_clip

torch.set_num_threads(1)


def _files(folder: Path, *names: str, data: bytes = b"") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or tiny_clip())
    return folder


def _list(path: Path, *rows: str, head: str = "path,label,split", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join([head, *rows]) + "\n").encode(encoding))
    return path


def _build(source: Path, output: Path, **settings: object) -> BuildReport:
    return build_shards(source, str(output), **({"clips_per_shard": 8, "min_seconds": 0.5} | settings))


def _keys(report: BuildReport) -> list[str]:
    return [key for shard in report.manifest.shards for key in shard.keys]


def test_names_that_are_not_ascii_keep_all_clips_apart(tmp_path: Path) -> None:
    words = {"狗": "公园散步 追逐皮球 海边奔跑", "猫": "窗边睡觉 抓挠沙发 喝一杯水"}
    for label, names in words.items():
        _files(tmp_path / "clips/train" / label, *(f"{name}.mp4" for name in names.split()))
    report = _build(tmp_path / "clips", tmp_path / "out")
    assert report.rejected == ()
    assert len(set(_keys(report))) == 6
    assert report.manifest.classes == ("狗", "猫")


def test_keys_are_those_of_the_composed_name_on_every_machine() -> None:
    composed = "café"
    assert safe_key(composed) == safe_key(unicodedata.normalize("NFD", composed)) == "caf--850f7dc43910"
    assert safe_key("ab_30.5-x") == "ab_30-5-x"
    assert safe_key("a b").startswith("a-b-")
    assert safe_key("a b") != safe_key("a+b")
    assert len(safe_key("é" * 300)) == len(safe_key("e" * 300)) == KEY_LENGTH


def test_one_stem_in_several_folders_is_several_clips(tmp_path: Path) -> None:
    names = [f"{person}/00001.mp4" for person in ("p1", "p2", "p3")]
    source = _list(_files(tmp_path / "a", *names) / "clips.csv", *(f"{name},dog,train" for name in names))
    report = _build(source, tmp_path / "out")
    assert len(set(_keys(report))) == 3
    assert all(key.startswith("00001-") for key in _keys(report))
    moved = _list(_files(tmp_path / "elsewhere", *names) / "clips.csv", *(f"{name},dog,train" for name in names))
    assert _keys(_build(moved, tmp_path / "again")) == _keys(report)


def test_the_same_file_and_interval_twice_is_a_duplicate(tmp_path: Path) -> None:
    rows = ["a.mp4,dog,train,,", "./x/../a.mp4,dog,train,,", "a.mp4,dog,train,0,0.8", "a.mp4,dog,train,0,0.8"]
    _files(tmp_path, "a.mp4", "x/b.mp4")
    report = _build(_list(tmp_path / "clips.csv", *rows, head="path,label,split,start,duration"), tmp_path / "out")
    assert _keys(report) == ["a", "a_0_800"]
    assert [rejection.kind for rejection in report.rejected] == ["duplicate", "duplicate"]


def test_files_that_are_no_videos_are_passed_over_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label in ("dog", "cat"):
        _files(tmp_path / f"clips/train/{label}", *(f"v{i}.mp4" for i in range(3)))
        _files(tmp_path / f"clips/train/{label}", *(f"v{i}.jpg" for i in range(3)), data=b"a picture")
        _files(tmp_path / f"clips/train/{label}", *(f"v{i}.info.json" for i in range(3)), data=b"{}")
    report = _build(tmp_path / "clips", tmp_path / "out")
    assert sorted(_keys(report)) == ["v0", "v0", "v1", "v1", "v2", "v2"]
    assert report.rejected == ()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/clips: 12 files without the ending of a video were passed over"
    ]


@pytest.mark.parametrize("is_good", [True, False])
def test_of_files_with_one_stem_the_one_that_decodes_is_taken(tmp_path: Path, is_good: bool) -> None:
    folder = _files(tmp_path / "clips/train/dog", "other.mp4")
    (folder / "v.mov").write_bytes(tiny_clip())
    (folder / "v.mkv").write_bytes(remuxed(tiny_clip(), container="matroska"))
    (folder / "v.mp4").write_bytes(tiny_clip() if is_good else tiny_clip()[:2000])
    report = _build(tmp_path / "clips", tmp_path / "out")
    assert sorted(_keys(report)) == ["other", "v"]
    kinds = {Path(rejection.path).name: rejection.kind for rejection in report.rejected}
    if is_good:
        assert kinds == {"v.mkv": "duplicate", "v.mov": "duplicate"}
    else:
        assert kinds == {"v.mp4": "corrupt", "v.mkv": "format"}


def test_spellings_of_one_class_are_one_class(tmp_path: Path) -> None:
    _files(tmp_path, "a.mp4", "b.mp4")
    source = _list(
        tmp_path / "c.csv", "a.mp4,caf\u00e9,train", "b.mp4,cafe\u0301,train", "a.mp4,dog,train", "b.mp4,dog , train"
    )
    assert read_listing(source).classes == ("café", "dog")
    assert _build(source, tmp_path / "out").manifest.classes == ("café", "dog")


def test_labels_of_all_listings_are_stripped_and_composed(tmp_path: Path) -> None:
    spelled = ["caf\u00e9", "cafe\u0301 ", " caf\u00e9"]
    ids = [f"abcdefghij{i}" for i in range(3)]
    rows = {
        "vggsound.csv": [f"{video},30,{label},train" for video, label in zip(ids, spelled, strict=True)],
        "test.csv": [f"{video}_000030.mp4,{label}" for video, label in zip(ids, spelled, strict=True)],
        "Annotations.txt": [
            "Category&VideoID&Quality&StartTime&EndTime",
            *(f"{label}&{video}&good&0&10" for video, label in zip(ids, spelled, strict=True)),
        ],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        assert {row.label for row in read_listing(tmp_path / name, tmp_path).rows} == {"caf\u00e9"}, name
    labels = {"train": {ids[0]: spelled[1]}, "val": {}, "test": {ids[1]: spelled[1]}}
    lists = read_published_lists(write_split_lists(tmp_path / "lists", labels, {spelled[1]: 0}))
    assert lists.classes == ("caf\u00e9",)
    assert set(lists.labels["test"].values()) == {"caf\u00e9"}


def test_validation_clips_are_held_out_of_classes_however_spelled(tmp_path: Path) -> None:
    rows = [f"abcdefghi{number:02d},30,{label},train" for number, label in enumerate(["dog"] * 10 + [" dog"] * 10)]
    (tmp_path / "vggsound.csv").write_text("\n".join(rows) + "\n")
    splits = [row.split for row in read_listing(tmp_path / "vggsound.csv", tmp_path).rows]
    assert splits.count("val") == 10


def test_name_that_is_not_utf8_is_listed_among_the_rejected(tmp_path: Path) -> None:
    folder = _files(tmp_path / "clips/train/dog", "a.mp4")
    strange = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")
    Path(strange).write_bytes(b"cut off")
    report = _build(tmp_path / "clips", tmp_path / "out")
    assert _keys(report) == ["a"]
    assert [rejection.path for rejection in report.rejected] == [strange]
    assert _build(tmp_path / "clips", tmp_path / "out").rejected == report.rejected


def test_class_names_with_markup_are_printed_as_they_are() -> None:
    text = io.StringIO()
    rejection = Rejection("gone.mp4", "Speech [/m/09x0r]", "train", "missing", "missing file")
    Console(file=text, width=200).print(rejection_table([rejection]))
    assert "Speech [/m/09x0r]" in text.getvalue()


@pytest.mark.parametrize(
    ("encoding", "rows", "words"),
    [
        ("cp1252", ["a.mp4,café,train"], r"clips\.csv: line 2 is not UTF-8; save it as CSV UTF-8"),
        ("utf-16", ["a.mp4,dog,train"], r"clips\.csv: line 1 is not UTF-8; save it as CSV UTF-8"),
        (
            "utf-8",
            ['a.mp4,"dog,train', *(f"b{i}.mp4,cat,train" for i in range(9000))],
            r"clips\.csv: line 2: not a row",
        ),
    ],
)
def test_list_that_is_no_csv_in_utf8_is_one_line(tmp_path: Path, encoding: str, rows: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        read_listing(_list(tmp_path / "clips.csv", *rows, encoding=encoding))
    assert "\n" not in str(raised.value)


def test_folder_beside_the_splits_is_named_or_passed_over(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        _files(tmp_path / "names", f"{split}/dog/{split}.mp4", data=b"x")
    with pytest.raises(DataError, match="valid: none of train, val, test"):
        read_listing(tmp_path / "names")
    for split in ("train", "val", "test"):
        _files(tmp_path / "stray", f"{split}/dog/{split}.mp4", data=b"x")
    _files(tmp_path / "stray", "annotations/readme.txt", data=b"x")
    assert len(read_listing(tmp_path / "stray").rows) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no clips in it; a folder of clips is FOLDER/<split>/<class>"):
        read_listing(tmp_path / "empty")


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    videos = _files(tmp_path / "videos", "abcdefghijk_000030.mp4")
    for name in ("latest", "current"):
        (videos / name).symlink_to(".")
    source = tmp_path / "vgg.csv"
    source.write_text("abcdefghijk,30,dog barking,train\n")
    assert [Path(row.clip.path) for row in read_listing(source, videos).rows] == [videos / "abcdefghijk_000030.mp4"]


def test_files_of_vggsound_are_found_in_any_container(tmp_path: Path) -> None:
    videos = _files(tmp_path / "videos", "aaaaaaaaaaa_000030_000040.mp4")
    webm = media("webm", seconds=1, codec="libvpx", sound="libopus", rate=48_000)
    (videos / "bbbbbbbbbbb_000005.webm").write_bytes(webm)
    source = tmp_path / "vggsound.csv"
    source.write_text("aaaaaaaaaaa,30,dog,train\nbbbbbbbbbbb,5,dog,test\n")
    report = _build(source, tmp_path / "out", videos=videos)
    assert report.rejected == ()
    assert _keys(report) == ["aaaaaaaaaaa_000030", "bbbbbbbbbbb_000005"]


def test_muted_and_damaged_sound_is_rejected(tmp_path: Path) -> None:
    silence = np.zeros(16_000, np.float32)
    nan = silence.copy()
    nan[100:110] = np.nan
    _files(tmp_path, "a.mp4")
    (tmp_path / "muted.mov").write_bytes(media("mov", seconds=1, sound="pcm_s16le", samples=silence))
    (tmp_path / "nan.mov").write_bytes(media("mov", seconds=1, sound="pcm_f32le", samples=nan))
    source = _list(tmp_path / "c.csv", *(f"{name},dog,train" for name in ("a.mp4", "muted.mov", "nan.mov")))
    report = _build(source, tmp_path / "out", keep_muted=False)
    assert _keys(report) == ["a"]
    assert _keys(_build(source, tmp_path / "kept", keep_muted=True)) == ["a", "muted"]
    with (tmp_path / "out/rejected.csv").open() as file:
        assert [(row["kind"], row["reason"]) for row in csv.DictReader(file)] == [
            ("silent", "its sound is all zeros"),
            ("corrupt", "its sound has values that are no number"),
        ]


def test_clips_with_eight_channels_are_built(tmp_path: Path) -> None:
    data = media("mp4", seconds=1, fps=8, rate=48_000, layout="7.1")
    _files(tmp_path / "clips/train/dog", *(f"s{i}.mp4" for i in range(4)), data=data)
    assert _keys(_build(tmp_path / "clips", tmp_path / "out")) == ["s0", "s1", "s2", "s3"]
