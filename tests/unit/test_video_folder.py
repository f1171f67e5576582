"""Files of videos that a listing names by id: all usual names, any container, and the one that decodes."""

from pathlib import Path

import pytest

from data_shards.build import BuildReport, build_shards
from data_shards.listings.listing import WHOLE_FILE, ClipFile
from data_shards.listings.video_folder import VideoFolder
from tests.helpers.media import media

ID = "a_b-cdefgh1"
CUT = (30.0, 10.0)


def _folder(path: Path, *names: str, data: bytes = b"") -> VideoFolder:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_bytes(data)
    return VideoFolder(path / "list.csv", path)


@pytest.mark.parametrize("ending", ["mp4", "webm", "mkv", "avi"])
@pytest.mark.parametrize("name", ["000030", "30", "30_40", "30000_40000", "000030_000040", "30.0_40.0", "30_37"])
def test_a_part_is_found_by_each_usual_name_in_any_container(tmp_path: Path, name: str, ending: str) -> None:
    clip = _folder(tmp_path / "videos", f"{ID}_{name}.{ending}").clip_at(ID, 30)
    assert Path(clip.path).name == f"{ID}_{name}.{ending}"
    assert clip.cut == (None if ending == "mp4" else WHOLE_FILE)
    assert (clip.key, clip.source, clip.start) == (f"{ID}_000030", ID, 30.0)


@pytest.mark.parametrize("name", ["000031", "3_13", "40_50", "30_90", "3000_13000", "30000", "000030_x"])
def test_another_part_of_the_video_is_not_taken(tmp_path: Path, name: str) -> None:
    clip = _folder(tmp_path / "videos", f"{ID}_{name}.mp4").clip_at(ID, 30)
    assert Path(clip.path).name == f"{ID}_000030.mp4"


def test_the_first_seconds_are_found_in_seconds_and_in_milliseconds(tmp_path: Path) -> None:
    for name in ("0_10", "0_10000", "000000", "000000_000010"):
        videos = _folder(tmp_path / name, f"{ID}_{name}.mp4")
        assert Path(videos.clip_at(ID, 0).path).name == f"{ID}_{name}.mp4"


def test_files_of_the_part_come_before_the_whole_video_and_mp4_before_others(tmp_path: Path) -> None:
    names = [f"{ID}.mp4", f"{ID}.webm", f"{ID}_000030.webm", f"{ID}_30_40.mp4"]
    clip = _folder(tmp_path / "videos", *names).clip_at(ID, 30)
    assert [(Path(file.path).name, file.cut) for file in clip.files] == [
        (f"{ID}_30_40.mp4", None),
        (f"{ID}_000030.webm", WHOLE_FILE),
        (f"{ID}.mp4", CUT),
        (f"{ID}.webm", CUT),
    ]


def test_a_whole_video_is_found_with_times_and_in_any_container(tmp_path: Path) -> None:
    videos = _folder(tmp_path / "videos", f"{ID}_000012_000022.webm", "abcdefghij2.mkv", "abcdefghij2.mp4")
    assert videos.whole_video(ID).files == (ClipFile(f"{videos.folder}/{ID}_000012_000022.webm", WHOLE_FILE),)
    assert [file.cut for file in videos.whole_video("abcdefghij2").files] == [None, WHOLE_FILE]


def _build(folder: Path, rows: str) -> BuildReport:
    (folder / "vggsound.csv").write_text(rows)
    source, videos = folder / "vggsound.csv", folder / "videos"
    return build_shards(source, f"{folder}/out", videos=videos, clips_per_shard=8, min_seconds=0.5)


def test_of_a_damaged_part_and_a_whole_video_the_one_that_decodes_is_taken(tmp_path: Path) -> None:
    whole = media("webm", seconds=12, fps=4, codec="libvpx", sound="libopus", rate=48_000)
    _folder(tmp_path / "videos", f"{ID}_000001.mp4", data=media("mp4", seconds=2)[:900])
    _folder(tmp_path / "videos", f"{ID}.webm", data=whole)
    _folder(tmp_path / "videos", "abcdefghij2_000005.mp4", data=b"text")
    report = _build(tmp_path, f"{ID},1,dog,train\nabcdefghij2,5,dog,train\nabcdefghij3,5,dog,train\n")
    assert [key for shard in report.manifest.shards for key in shard.keys] == [f"{ID}_000001"]
    found = {Path(rejection.path).name: rejection.kind for rejection in report.rejected}
    assert found == {"abcdefghij2_000005.mp4": "corrupt", "abcdefghij3_000005.mp4": "missing"}


def test_a_clip_that_no_file_gives_is_rejected_once(tmp_path: Path) -> None:
    _folder(tmp_path / "videos", f"{ID}_000030.mp4", f"{ID}_30_40.webm", f"{ID}.mp4", data=b"text")
    _folder(
        tmp_path / "videos", "abcdefghij2_000005.webm", data=media("webm", codec="libvpx", sound="libopus", rate=48_000)
    )
    report = _build(tmp_path, f"{ID},30,dog,train\nabcdefghij2,5,dog,train\n")
    assert [Path(rejection.path).name for rejection in report.rejected] == [f"{ID}_000030.mp4"]
