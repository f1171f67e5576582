import csv
import os
from pathlib import Path
from typing import Any

import pytest

from avcil_dist.errors import ConfigError, DataError
from data_shards.build import BuildSettings, Chunk, plan_build
from data_shards.listings import rows
from data_shards.listings.frame_folders import FrameOptions
from data_shards.listings.listing import ClipFile, ListedClip, Listing, ListingRow, stored_rows
from data_shards.listings.read import read_listing
from data_shards.listings.splits import hold_out_validation
from tests.helpers.data import needs_published, published
from tests.helpers.published_forms import (
    CLASS_NAMES,
    MADE_BENCHMARKS,
    make_benchmark,
    vggsound_test_rows,
    video_id,
    write_vggsound,
)


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def _clips_by_key(source: Listing) -> dict[str, tuple[str, float, tuple[float, float | None] | None]]:
    """Per key: the file, the second in the video, and the cut."""
    return {row.clip.key: (Path(row.clip.path).name, row.clip.start, row.clip.cut) for row in source.rows}


def test_vggsound_rows_find_files_by_all_their_usual_names(tmp_path: Path) -> None:
    (tmp_path / "vggsound.csv").write_text(
        'aaaaaaaaaaa,30,"bird chirping, tweeting",train\n'
        "bb_bbbb-bbb,5,dog barking,test\n"
        "ccccccccccc,120,dog barking,test\n"
        "ddddddddddd,0,dog barking,test\n"
    )
    videos = _touch(
        tmp_path / "videos", "a/aaaaaaaaaaa_000030.mp4", "b/bb_bbbb-bbb_5000_15000.mp4", "ccccccccccc.webm", "x.txt"
    )
    source = read_listing(tmp_path / "vggsound.csv", videos)
    assert source.classes == ("bird chirping, tweeting", "dog barking")
    assert _clips_by_key(source) == {
        "aaaaaaaaaaa_000030": ("aaaaaaaaaaa_000030.mp4", 30.0, None),
        "bb_bbbb-bbb_000005": ("bb_bbbb-bbb_5000_15000.mp4", 5.0, None),
        "ccccccccccc_000120": ("ccccccccccc.webm", 120.0, (120.0, 10.0)),
        "ddddddddddd_000000": ("ddddddddddd_000000.mp4", 0.0, None),
    }
    assert [row.clip.source for row in source.rows] == ["aaaaaaaaaaa", "bb_bbbb-bbb", "ccccccccccc", "ddddddddddd"]


def test_rows_beyond_the_first_ones_are_in_a_file_and_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _touch(tmp_path, "a/v.mp4", "b/v.mp4", "v.mp4", "series/1.jpg", "series.wav")
    lines = [
        *("a/v.mp4,dog,train,,,,", "b/v.mp4, dog ,train,film,1.5,2,0 0.5 0.5 1", "series,cat,val,,,,"),
        *("v.mp4,dog,train,,3,,", "v.mp4,dog,train,,3,,", "a/v.mp4,cat,train,,,,", "b/v.mp4,dog,train,,,,"),
        "missing.mp4,cat,test,,,,",
    ]
    (tmp_path / "clips.csv").write_text("\n".join(["path,label,split,source,start,duration,region", *lines * 2]))

    def plan() -> tuple[list[ListingRow], Any, list[Chunk]]:
        listing = read_listing(tmp_path / "clips.csv", frames=FrameOptions(rate=5.0))
        made, chunks = plan_build(listing, BuildSettings(2, 0.5, keep_muted=True))
        return list(listing.rows), made, list(chunks)

    expected = plan()
    assert [found.kind for found in expected[1].rejected].count("duplicate") == 8  # of 14 rows of 6 clips
    monkeypatch.setattr(rows, "READ_AT_ONCE", 2)
    monkeypatch.setattr(rows, "WRITTEN_AT_ONCE", 100)
    for number in (0, 5):
        monkeypatch.setattr(rows, "NUM_IN_MEMORY", number)
        assert plan() == expected
    listing = read_listing(tmp_path / "clips.csv")
    assert [listing.rows[-1], listing.rows[6]] == [list(listing.rows)[-1], list(listing.rows)[6]]
    assert listing.rows[3:6] == list(listing.rows)[3:6]
    spelled = stored_rows([ListingRow("a", "val", ListedClip((ClipFile(os.fsdecode(b"\xff")),), "k", "s"))] * 6)
    assert spelled[5] == spelled[0]
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - the rows keep it
    monkeypatch.setattr(rows.tempfile, "TemporaryFile", lambda **_: full)
    with pytest.raises(DataError, match=r"cannot be written there \(No space left on device\); make room"):
        read_listing(tmp_path / "clips.csv")


def test_ids_without_the_folder_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vggsound.csv").write_text("aaaaaaaaaaa,30,dog,train\n")
    with pytest.raises(ConfigError, match="--videos"):
        read_listing(tmp_path / "vggsound.csv")
    (tmp_path / "clips.csv").write_text("path,label,split\na.mp4,dog,train\n")
    with pytest.raises(ConfigError, match="leave out --videos"):
        read_listing(tmp_path / "clips.csv", tmp_path)


def test_lists_in_the_form_of_vggsound_hold_out_validation_clips(tmp_path: Path) -> None:
    train = dict.fromkeys(CLASS_NAMES, 40) | {"Bark": 5}  # of a small class, at most half are held out
    write_vggsound(tmp_path, vggsound_test_rows(6), train)
    for source in _check_vggsound(tmp_path, {"train": 245 - 62, "val": 62, "test": 42}):
        assert set(source.classes) == set(CLASS_NAMES)
        held = [row.label for row in source.rows if row.split == "val"]
        assert {label: held.count(label) for label in CLASS_NAMES} == dict.fromkeys(CLASS_NAMES, 10) | {"Bark": 2}


@needs_published("vggsound")
def test_vggsound_has_its_published_counts(tmp_path: Path) -> None:
    """The test list is the real one; of the train clips only the number in each class is known, their ids are made."""
    with (published("vggsound") / "test.csv").open(newline="") as file:
        test = list(csv.reader(file))
    with (published("vggsound") / "stat.csv").open(newline="") as file:
        clips = {label: int(count) for label, count, _ in csv.reader(file)}
    for _, label in test:
        clips[label] -= 1
    write_vggsound(tmp_path, test, clips)
    for source in _check_vggsound(tmp_path, {"train": 180_640, "val": 3_090, "test": 15_446}):
        assert len(source.classes) == 309
        held = [row.label for row in source.rows if row.split == "val"]
        assert {held.count(name) for name in source.classes} == {10}


def _check_vggsound(folder: Path, counts: dict[str, int]) -> tuple[Listing, Listing]:
    """Read by `vggsound.csv` and by `test.csv` and `train.csv`: both have these clips a split, and the same rows."""
    by_csv = read_listing(folder / "vggsound.csv", folder)
    by_lists = read_listing(folder / "test.csv", folder)
    for source in (by_csv, by_lists):
        keys = {
            split: {row.clip.key for row in source.rows if row.split == split} for split in ("train", "val", "test")
        }
        assert {split: len(keys_of_split) for split, keys_of_split in keys.items()} == counts
    assert {tuple(row) for row in by_csv.rows} == {tuple(row) for row in by_lists.rows}
    return by_csv, by_lists


def test_validation_clips_do_not_depend_on_the_order_of_the_list() -> None:
    clips = [("dog", f"k{i}") for i in range(100)] + [("cat", "only"), ("cat", "two")]
    held = hold_out_validation(clips)
    assert held == hold_out_validation(reversed(clips))
    assert sum(label == "dog" for label, _ in held) == 10
    assert sum(label == "cat" for label, _ in held) == 1


AVE = "Category&VideoID&Quality&StartTime&EndTime\n"


def test_ave_annotations_are_split_by_the_lists_beside_them(tmp_path: Path) -> None:
    lines = [f"Church bell&id-{i}&good&0&10\n" for i in range(4)] + ["Male speech, man speaking&id-0&good&2&8\n"]
    (tmp_path / "Annotations.txt").write_text(AVE + "".join(lines))
    videos = _touch(tmp_path / "AVE", *(f"id-{i}.mp4" for i in range(4)))
    hashed = read_listing(tmp_path / "Annotations.txt", videos)
    assert hashed.classes == ("Church bell", "Male speech, man speaking")
    assert len(hashed.rows) == 5
    for name, chosen in (("trainSet.txt", lines[:2]), ("valSet.txt", lines[2:3]), ("testSet.txt", lines[4:])):
        (tmp_path / name).write_text("".join(chosen))
    listed = read_listing(tmp_path / "Annotations.txt", videos)
    assert [(row.label[:6], row.split, row.clip.key) for row in listed.rows] == [
        ("Church", "train", "id-0"),
        ("Church", "train", "id-1"),
        ("Church", "val", "id-2"),
        ("Male s", "test", "id-0"),
    ]
    assert {row.clip.cut for row in listed.rows} == {None}  # the times are of the event within the clip


def test_ave_annotations_may_repeat_a_line_and_name_a_video_in_two_classes(tmp_path: Path) -> None:
    first, second = (video_id(number) for number in (6, 7))
    lines = [f"{label}&{video}&good&0&10\n" for label in CLASS_NAMES[:2] for video in (first, second)]
    (tmp_path / "Annotations.txt").write_text(AVE + "".join([*lines, lines[0]]) + "\n")
    videos = _touch(tmp_path / "AVE", f"{first}.mp4", f"{second}.mp4")
    rows = read_listing(tmp_path / "Annotations.txt", videos).rows
    assert [(row.label, row.clip.key) for row in rows] == [
        (label, video) for label in CLASS_NAMES[:2] for video in (first, second)
    ]
    assert {Path(row.clip.path) for row in rows} == {videos / f"{first}.mp4", videos / f"{second}.mp4"}


def test_faulty_ave_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "Annotations.txt").write_text(AVE + "Church bell&id\n")
    with pytest.raises(DataError, match="line 2: not Category"):
        read_listing(tmp_path / "Annotations.txt", tmp_path)


@pytest.mark.parametrize("name", MADE_BENCHMARKS)
def test_lists_in_the_published_form_give_classes_splits_and_files(tmp_path: Path, name: str) -> None:
    benchmark = MADE_BENCHMARKS[name]
    lists = make_benchmark(tmp_path / "lists", name)
    _check_published_lists(lists, tmp_path, benchmark.file, len(CLASS_NAMES), benchmark.counts)


@pytest.mark.parametrize(
    ("name", "file", "classes", "counts"),
    [
        ("AVE", "{key}.mp4", 28, (3294, 391, 394)),
        ("kinetics-sounds", "{key}_000010_000020.mp4", 30, (19220, 1947, 1958)),
        ("VGGSound_100", "{key}.mp4", 100, (51195, 5000, 5000)),
    ],
)
@needs_published("official_splits")
def test_published_lists_give_classes_splits_and_files(
    tmp_path: Path, name: str, file: str, classes: int, counts: tuple[int, int, int]
) -> None:
    _check_published_lists(published("official_splits") / name, tmp_path, file, classes, counts)


def _check_published_lists(lists: Path, videos: Path, file: str, classes: int, counts: tuple[int, int, int]) -> None:
    first = read_listing(lists, videos).rows[0].clip
    _touch(videos, file.format(key=first.key))
    source = read_listing(lists, videos)
    assert len(source.classes) == classes
    splits = [row.split for row in source.rows]
    assert tuple(splits.count(split) for split in ("train", "val", "test")) == counts
    assert Path(source.rows[0].clip.path).name == file.format(key=first.key)
    assert source.rows[0].clip.key == first.key


def test_csv_rows_may_cut_parts_out_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(
        "path,label,split,start,duration,source\n"
        "a.mp4,dog,train,,,\n"
        "a.mp4,dog,train,2.5,4,film\n"
        "a.mp4,cat,test,7,,\n"
        "a.mp4,cat,test,,3,\n"
    )
    source = read_listing(tmp_path / "clips.csv")
    assert _clips_by_key(source) == {
        "a": ("a.mp4", 0.0, None),
        "a_2500_6500": ("a.mp4", 2.5, (2.5, 4.0)),
        "a_7000_end": ("a.mp4", 7.0, (7.0, None)),
        "a_0_3000": ("a.mp4", 0.0, (0.0, 3.0)),
    }
    assert [row.clip.source for row in source.rows] == ["a", "film", "a", "a"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("clips.csv", "path,label,split,start\na.mp4,dog,train,soon\n", "line 2: 'soon' is not a number of seconds"),
        ("clips.csv", "path,label,split,fps\na.mp4,dog,train,25\n", "its header has 'fps'"),
        ("vggsound.csv", "aaaaaaaaaaa,30,dog,train\nbbbbbbbbbbb,x,dog,train\n", "line 2: start 'x'"),
        ("vggsound.csv", "aaaaaaaaaaa,30,dog,train\nbbbbbbbbbbb,5,dog\n", "line 2: has not 4 columns"),
        ("vggsound.csv", "aaaaaaaaaaa,30,dog,training\n", "line 1: split 'training'"),
        ("other.csv", "aaaaaaaaaaa.mp4,dog\n", "its header is"),
        ("gone.csv", None, "missing"),
    ],
)
def test_faulty_list_is_named_with_its_line(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_listing(tmp_path / name, None if name == "clips.csv" else tmp_path)


def test_file_of_the_whole_video_comes_before_that_of_a_span(tmp_path: Path) -> None:
    (tmp_path / "Annotations.txt").write_text(AVE + "Church bell&id-0&good&0&10\nChurch bell&id-1&good&0&10\n")
    videos = _touch(tmp_path / "AVE", "id-0.mp4", "id-0_000010_000020.mp4", "id-1_000010_000020.mp4")
    files = [Path(row.clip.path).name for row in read_listing(tmp_path / "Annotations.txt", videos).rows]
    assert files == ["id-0.mp4", "id-1_000010_000020.mp4"]
