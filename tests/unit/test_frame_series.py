"""Clips that are a folder of pictures and a wav: pictures at their times, whatever their names, numbers and sizes."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avcil_dist.data.decode import decode_clip
from avcil_dist.errors import ConfigError, DataError
from data_shards.build import BuildSettings, build_listing
from data_shards.clip_bytes import file_stamp, read_clip
from data_shards.listings.frame_folders import FrameOptions
from data_shards.listings.listing import ClipFile, FrameSeries
from data_shards.listings.read import read_listing
from data_shards.rejections import ClipRejectedError
from tests.helpers.media import grey_of
from tests.helpers.pictures import series, wav

torch.set_num_threads(1)

NUMBERS = range(16)


def _clip(folder: Path, rate: float | None = 8.0, cut: tuple[float, float | None] | None = None) -> bytes:
    return read_clip(ClipFile(str(folder), cut, frames=FrameSeries(rate, f"{folder}.wav")))


def _shown(data: bytes) -> list[tuple[float, int]]:
    """Times of the frames, and the number of the picture that each shows."""
    greys = {grey_of(number): number for number in NUMBERS}
    with av.open(io.BytesIO(data)) as container:
        frames = [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24")[12:36, 16:48].mean())
            for frame in container.decode(video=0)
        ]
    return [(round(time, 3), greys[min(greys, key=lambda grey: abs(grey - mean))]) for time, mean in frames]


def _rate_8(first: int = 0, left_out: tuple[int, ...] = ()) -> list[tuple[float, int]]:
    return [(number / 8, number) for number in NUMBERS if number >= first and number not in left_out]


NAMES = {
    "from 1": [f"{number + 1:05d}.jpg" for number in NUMBERS],
    "from 0": [f"{number:05d}.jpg" for number in NUMBERS],
    "without zeros": [f"{number + 1}.jpg" for number in NUMBERS],
    "with words": [f"frame_{number + 1}.JPEG" for number in NUMBERS],
    "png": [f"img-{number:03d}.png" for number in NUMBERS],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_numbered_pictures_follow_with_their_rate(tmp_path: Path, names: list[str]) -> None:
    data = _clip(series(tmp_path / "ID", names))
    assert _shown(data) == _rate_8()
    with av.open(io.BytesIO(data)) as container:
        assert container.format.name.startswith("mov,mp4")
        assert float(container.streams.video[0].duration * container.streams.video[0].time_base) == pytest.approx(2.0)


def test_levels_and_sound_are_those_of_the_pictures_and_the_wav(tmp_path: Path) -> None:
    decoded = decode_clip(
        _clip(series(tmp_path / "ID", NAMES["from 1"])), num_frames=4, sample_rate=16_000, silent="error", where="x"
    )
    greys = [float(frame.float().mean()) for frame in decoded.frames]
    assert greys == pytest.approx([grey_of(number) for number in (2, 6, 10, 14)], abs=3)
    sound = decoded.waveform.numpy().reshape(-1)
    assert len(sound) == pytest.approx(32_000, abs=1600)
    assert np.abs(np.fft.rfft(sound)).argmax() * 16_000 / len(sound) == pytest.approx(440, abs=2)


def test_a_missing_number_is_a_time_without_a_new_picture(tmp_path: Path) -> None:
    folder = series(tmp_path / "ID", NAMES["from 1"])
    for name in ("00005.jpg", "00006.jpg"):
        (folder / name).unlink()
    assert _shown(_clip(folder)) == _rate_8(left_out=(4, 5))
    (folder / "00001.jpg").unlink()  # the first that is there is shown from the start
    assert _shown(_clip(folder))[:2] == [(0.0, 1), (0.25, 2)]


def test_pictures_of_odd_and_changing_sizes_become_one_size(tmp_path: Path) -> None:
    data = _clip(series(tmp_path / "ID", NAMES["from 1"], sizes=[(65, 49), (120, 80), (48, 64)]))
    assert _shown(data) == _rate_8()
    with av.open(io.BytesIO(data)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 48)


def test_times_are_those_of_names_or_of_a_file(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.5, 0.512, 1.9]
    expected = [(time, number) for number, time in enumerate(times)]
    assert _shown(_clip(series(tmp_path / "names", [f"{time:.3f}.jpg" for time in times]), rate=None)) == expected
    lines = {"in order": [str(time) for time in times], "by name": [f"{n}.jpg {time}" for n, time in enumerate(times)]}
    for name, text in lines.items():
        folder = series(tmp_path / name, [f"{number}.jpg" for number in range(5)])
        (folder / "times.txt").write_text("\n".join(text) + "\n")
        assert _shown(_clip(folder, rate=3.0)) == expected


def test_a_part_of_a_series_is_cut(tmp_path: Path) -> None:
    data = _clip(series(tmp_path / "ID", NAMES["from 1"]), cut=(0.5, 1.0))
    assert _shown(data) == [(number / 8, number + 4) for number in range(8)]


@pytest.mark.parametrize(
    ("names", "rate", "times", "words"),
    [
        (["00001.jpg", "00002.jpg"], None, None, "no times of its pictures; give their number a second"),
        (["a.jpg", "b.jpg"], 8.0, None, "a.jpg: no number"),
        (["1.jpg", "01.jpg"], 8.0, None, "01.jpg and 1.jpg have one time"),
        (["90.jpg", "91.jpg"], 8.0, None, "begins after the end of its sound"),
        ([], 8.0, None, "0 pictures"),
        (["1.jpg", "2.jpg"], 8.0, "0.5\n", "times.txt: not one line for each of 2 pictures"),
        (["1.jpg", "2.jpg"], 8.0, "1.jpg 0\n3.jpg 1\n", "times.txt: not one line"),
        (["1.jpg", "2.jpg"], 8.0, "nan\n1\n", "nan s is no time"),
        (["1.jpg", "2.jpg"], 8.0, "-1\n1\n", "-1 s is no time"),
    ],
)
def test_a_series_that_is_no_clip_is_rejected(
    tmp_path: Path, names: list[str], rate: float | None, times: str | None, words: str
) -> None:
    folder = series(tmp_path / "ID", names)
    if times:
        (folder / "times.txt").write_text(times)
    with pytest.raises(ClipRejectedError, match=words):
        _clip(folder, rate)


def test_damaged_pictures_and_sounds_are_rejected(tmp_path: Path) -> None:
    folder = series(tmp_path / "ID", NAMES["from 1"])
    (folder / "00001.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError):
        _clip(folder)
    (tmp_path / "a").mkdir()
    folder = series(tmp_path / "a/ID", NAMES["from 1"])
    Path(f"{folder}.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError):
        _clip(folder)


def _built(source: Path, output: Path, **options: object) -> tuple[list[str], dict[str, str]]:
    """The keys of the clips that are taken, and the reasons for the others by name."""
    videos = options.pop("videos", None)
    listing = read_listing(source, videos, None, FrameOptions(**options))  # type: ignore[arg-type]
    report = build_listing(listing, str(output), BuildSettings(8, 0.5, keep_muted=True))
    keys = [key for shard in report.manifest.shards for key in shard.keys]
    return sorted(keys), {Path(rejection.path).name: rejection.reason for rejection in report.rejected}


def test_a_class_folder_a_csv_and_ids_may_have_series(tmp_path: Path) -> None:
    clips = tmp_path / "clips/dog"
    for name in ("a", "b", "abcdefghijk"):
        series(clips / name, NAMES["from 1"])
    series(clips / "mute", NAMES["from 1"], sound=None)
    series(clips / "inside", NAMES["from 1"], sound=None)
    wav(clips / "inside/inside.wav", 2.0)
    (clips / "notes.txt").write_text("x")
    keys, rejected = _built(tmp_path / "clips", tmp_path / "out", rate=8.0)
    assert keys == ["a", "abcdefghijk", "b", "inside"]
    assert rejected == {"mute": "no sound: mute.wav is missing"}
    assert read_listing(tmp_path / "clips").passed_over == 1

    rows = ["path,label,split,start,duration", "clips/dog/a,dog,train,,", "clips/dog/b,dog,train,0.5,1"]
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    assert _built(tmp_path / "clips.csv", tmp_path / "csv", rate=8.0) == (["a", "b_500_1500"], {})

    (tmp_path / "vggsound.csv").write_text("abcdefghijk,1,dog,train\n")
    keys, rejected = _built(tmp_path / "vggsound.csv", tmp_path / "ids", rate=8.0, videos=tmp_path / "clips")
    assert (keys, rejected) == (["abcdefghijk_000001"], {})


def test_sounds_may_be_in_a_folder_of_their_own(tmp_path: Path) -> None:
    series(tmp_path / "frames/dog/a", NAMES["from 1"], sound=None)
    (tmp_path / "audio/deep").mkdir(parents=True)
    wav(tmp_path / "audio/deep/a.wav", 2.0)
    assert _built(tmp_path / "frames", tmp_path / "out", rate=8.0, sounds=tmp_path / "audio") == (["a"], {})
    with pytest.raises(DataError, match="no such folder"):
        read_listing(tmp_path / "frames", None, None, FrameOptions(sounds=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--fps 0"):
        FrameOptions(rate=0.0)


def test_another_rate_or_picture_is_another_clip(tmp_path: Path) -> None:
    folder = series(tmp_path / "clips/dog/a", NAMES["from 1"])
    options = FrameOptions(8.0)
    file = read_listing(tmp_path / "clips", None, None, options).rows[0].clip.files[0]
    stamp = file_stamp(file)
    assert file_stamp(file._replace(frames=FrameSeries(4.0, f"{folder}.wav"))) != stamp
    (folder / "00001.jpg").unlink()
    assert file_stamp(file) != stamp
    _built(tmp_path / "clips", tmp_path / "out", rate=8.0)
    with pytest.raises(ConfigError, match="other clips or with other settings"):
        _built(tmp_path / "clips", tmp_path / "out", rate=4.0)
