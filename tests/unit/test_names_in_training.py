"""Names of files, keys, classes and splits as others give them: clips read in training show their own pictures.

Each is read from a cut, which `shards build` makes of a csv or of a list of videos, and from a tar of others.
"""

import json
from pathlib import Path

import pytest
import torch

from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.errors import DataError
from data_shards.build import BuildReport, BuildSettings, build_listing, build_shards
from data_shards.importers.webdataset_tars import import_tars
from data_shards.listings.listing import read_class_names
from data_shards.listings.mixed_tars import SampleRules, read_mixed_tars
from data_shards.listings.splits import SplitShares
from data_shards.verify import verify_shards
from tests.helpers.media import media
from tests.helpers.reading import frame_numbers
from tests.helpers.tars import write_tar

torch.set_num_threads(1)
SPELLINGS = ("caf\u00e9", "cafe\u0301", " caf\u00e9 ")
CUT = (",1,1", 12, 17)  # start and duration in a csv, and the frames at a quarter and three quarters of the cut
WHOLE = (5, 15)  # those of a clip of 2 s


def _clip(first: int = 0) -> bytes:
    """Two seconds; their first frame has the number `first`."""
    return media("mp4", seconds=2, fps=10, first=first)


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def _cuts(folder: Path, *rows: str) -> BuildReport:
    """Build the cut of the second second of each row's file; `rows` are a path and a label."""
    lines = ["path,label,split,start,duration", *(f"{row},train{CUT[0]}" for row in rows)]
    (folder / "clips.csv").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    return build_shards(folder / "clips.csv", f"{folder}/out", clips_per_shard=8, min_seconds=0.5)


def _imported(folder: Path, *tars: dict[str, bytes], **settings: object) -> Manifest:
    urls = [write_tar(folder / f"{number}.tar", files) for number, files in enumerate(tars)]
    import_tars(urls, f"{folder}/manifest.json", **settings)  # type: ignore[arg-type]
    assert verify_shards(f"{folder}/manifest.json") == []
    return load_manifest(f"{folder}/manifest.json")


def _repacked(folder: Path, files: dict[str, bytes]) -> Manifest:
    listing = read_mixed_tars([write_tar(folder / "mixed.tar", files)], SampleRules(), SplitShares(1, 0, 0))
    return build_listing(listing, f"{folder}/out", BuildSettings(8, 0.5, keep_muted=True)).manifest


def _json(label: str = "dog", split: str = "train") -> bytes:
    return json.dumps({"label": label, "split": split}).encode()


def _of_cut(*firsts: int) -> list[list[int]]:
    return [[first + number for number in CUT[1:]] for first in firsts]


def _of_whole(*firsts: int) -> list[list[int]]:
    return [[first + number for number in WHOLE] for first in firsts]


def test_cut_is_not_taken_of_files_beside_the_video(tmp_path: Path) -> None:
    names = [f"v{number}.{ending}" for number in range(3) for ending in ("info.json", "jpg", "mp4")]
    _write(tmp_path, {name: _clip(4 * int(name[1])) if name.endswith("mp4") else b"{}" for name in names})
    report = _cuts(tmp_path, *(f"{name},dog" for name in names))
    assert frame_numbers(report.manifest) == _of_cut(0, 4, 8)
    found = [(Path(rejection.path).name, rejection.kind) for rejection in report.rejected]
    assert found == [(name, "corrupt") for name in names if not name.endswith("mp4")]


def test_cut_of_a_listed_video_is_of_the_file_that_decodes(tmp_path: Path) -> None:
    video = media("matroska", seconds=12, fps=2)
    files = {"info.json": b"{}", "jpg": b"a picture", "mp4": video[:900], "mkv": video, "webm": b"text"}
    _write(tmp_path / "videos", {f"abcdefghijk.{ending}": data for ending, data in files.items()})
    (tmp_path / "vggsound.csv").write_text("abcdefghijk,2,dog,train\n")
    report = build_shards(
        tmp_path / "vggsound.csv", f"{tmp_path}/out", videos=tmp_path / "videos", clips_per_shard=8, min_seconds=0.5
    )
    assert report.rejected == ()
    assert frame_numbers(report.manifest) == [[9, 19]]


def test_tar_with_other_files_of_each_clip_is_read(tmp_path: Path) -> None:
    files = {}
    for number in range(2):
        for ending, data in {"info.json": b"{}", "jpg": b"x", "json": _json(), "mp4": _clip(4 * number)}.items():
            files[f"v{number}.{ending}"] = data
    manifest = _imported(tmp_path, files)
    assert manifest.shards[0].keys == ("v0", "v1")
    assert frame_numbers(manifest) == _of_whole(0, 4)


def test_cuts_of_files_with_one_stem_or_other_letters_keep_their_pictures(tmp_path: Path) -> None:
    names = ["p1/00001.mp4", "p2/00001.mp4", "p3/00001.mp4", "\u516c\u56ed.mp4", "\u6d77\u8fb9.mp4", "\u6c34.mp4"]
    _write(tmp_path, {name: _clip(4 * number) for number, name in enumerate(names)})
    report = _cuts(tmp_path, *(f"{name},\u72d7" for name in names))
    assert report.rejected == ()
    assert len(set(report.manifest.shards[0].keys)) == 6
    assert frame_numbers(report.manifest) == _of_cut(*range(0, 24, 4))


def test_tar_with_folders_and_other_letters_is_repacked_with_all_its_clips(tmp_path: Path) -> None:
    stems = ["p1/00001", "p2/00001", "\u516c\u56ed", "\u6d77\u8fb9"]
    files = {}
    for number, stem in enumerate(stems):
        files |= {f"{stem}.mp4": _clip(4 * number), f"{stem}.json": _json("\u72d7")}
    with pytest.raises(DataError, match=r"0\.tar: clip key 'p1/00001'; keys are .*avcil shards repack URL OUTPUT$"):
        _imported(tmp_path, files)
    manifest = _repacked(tmp_path, files)
    assert len(set(manifest.shards[0].keys)) == 4
    assert frame_numbers(manifest) == _of_whole(0, 4, 8, 12)


def test_split_of_another_name_is_refused_in_a_csv_and_read_in_a_tar(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,label,split,start,duration\nv.mp4,dog,valid,1,1\n")
    with pytest.raises(DataError, match=r"clips\.csv: line 2: split 'valid' is none of train, val, test"):
        build_shards(tmp_path / "clips.csv", f"{tmp_path}/out", clips_per_shard=8, min_seconds=0.5)
    words = ("valid", "validation", "val")
    files = {f"v{number}.json": _json(split=word) for number, word in enumerate(words)}
    manifest = _imported(tmp_path, files | {f"v{number}.mp4": _clip(4 * number) for number in range(3)})
    assert [shard.split for shard in manifest.shards] == ["val"]
    assert frame_numbers(manifest, "val") == _of_whole(0, 4, 8)
    for split in ("dev", ["val"]):
        write_tar(tmp_path / "a.tar", {"v.mp4": b"", "v.json": json.dumps({"label": "dog", "split": split}).encode()})
        with pytest.raises(DataError, match=r"v\.json: split .* none of train, val, test; .* --split 0\.8,0\.1,0\.1$"):
            import_tars([f"{tmp_path}/a.tar"], f"{tmp_path}/other.json")


def test_split_of_another_name_does_not_count_where_splits_are_given(tmp_path: Path) -> None:
    files = {"v.mp4": _clip(4), "v.json": _json(split="dev")}
    assert frame_numbers(_repacked(tmp_path, files)) == _of_whole(4)
    assert "split 'dev' is none of" in read_mixed_tars([f"{tmp_path}/mixed.tar"], SampleRules()).rejected[0].reason


def test_hidden_files_and_marks_of_other_systems_are_passed_over(tmp_path: Path) -> None:
    _write(tmp_path, {"v.mp4": _clip(8), "._v.mp4": bytes(163)})
    report = _cuts(tmp_path, "./._v.mp4,dog", "./v.mp4,dog")
    assert frame_numbers(report.manifest) == _of_cut(8)
    assert [Path(rejection.path).name for rejection in report.rejected] == ["._v.mp4"]
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfdog\r\ncat\r\n")
    dot = {"./k1.cls": b"0\n", "./k1.mp4": _clip(4)}
    mac = {"._k2.cls": bytes(163), "k2.cls": b"\xef\xbb\xbf0\n", "._k2.mp4": bytes(163), "k2.mp4": _clip(8), ".DS": b""}
    manifest = _imported(tmp_path, dot, mac, split="train", classes=read_class_names(tmp_path / "names.txt"))
    assert manifest.classes == ("dog",)
    assert frame_numbers(manifest) == _of_whole(4, 8)


def test_spellings_of_a_class_are_one_class(tmp_path: Path) -> None:
    _write(tmp_path, {f"v{number}.mp4": _clip(4 * number) for number in range(3)})
    report = _cuts(tmp_path, *(f"v{number}.mp4,{label}" for number, label in enumerate(SPELLINGS)))
    assert report.manifest.classes == ("caf\u00e9",)
    assert frame_numbers(report.manifest) == _of_cut(0, 4, 8)
    files = {}
    for number, label in enumerate(SPELLINGS):
        files |= {f"v{number}.mp4": _clip(4 * number), f"v{number}.json": _json(label)}
    manifest = _imported(tmp_path, files)
    assert manifest.classes == ("caf\u00e9",)
    assert frame_numbers(manifest) == _of_whole(0, 4, 8)
