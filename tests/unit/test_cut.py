import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from avcil_dist.data.decode import decode_clip, probe_clip
from avcil_dist.errors import DataError
from data_shards.build import build_shards
from data_shards.cut import cut_clip

RATE, SOUND_RATE, STEP = 8, 16_000, 2


def film(path: Path, *, seconds: int = 6, gop: int = 8, b_frames: int = 0, sound: str = "aac") -> Path:
    """A film whose frame i is grey of level 2 i, and whose sound is loud from second 3 on."""
    with av.open(str(path), "w") as target:
        video = target.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.options = {"crf": "5", "g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "bf": str(b_frames)}
        audio = target.add_stream(sound, rate=SOUND_RATE, layout="mono")
        for i in range(seconds * RATE):
            picture = np.full((48, 64, 3), STEP * i, dtype=np.uint8)
            target.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(video.encode(None))
        times = np.arange(seconds * SOUND_RATE) / SOUND_RATE
        wave = (np.where(times >= 3, 0.8, 0.0) * np.sin(2 * np.pi * 1000 * times)).astype(np.float32)
        kind = "fltp" if sound == "aac" else "s16"
        values = wave[None] if sound == "aac" else (wave[None] * 32767).astype(np.int16)
        for first in range(0, values.shape[1], 1000):
            block = av.AudioFrame.from_ndarray(values[:, first : first + 1000], format=kind, layout="mono")
            block.sample_rate, block.pts, block.time_base = SOUND_RATE, first, Fraction(1, SOUND_RATE)
            target.mux(audio.encode(block))
        target.mux(audio.encode(None))
    return path


def _pictures(data: bytes | str) -> list[np.ndarray]:
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def _times(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.time for frame in container.decode(video=0)]


def _loud_from(data: bytes) -> float:
    """The second at which the sound becomes loud."""
    decoded = decode_clip(data, num_frames=1, sample_rate=SOUND_RATE, silent="error", where="x")
    return float(np.flatnonzero(np.abs(decoded.waveform.numpy()) > 0.4)[0]) / SOUND_RATE


def test_cut_at_a_key_frame_copies_the_pictures_bit_for_bit(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4")
    data = cut_clip(str(path), 2.0, 3.0)
    whole, part = _pictures(str(path)), _pictures(data)
    assert len(part) == 24
    for number, picture in enumerate(part):
        np.testing.assert_array_equal(picture, whole[16 + number])
    assert _times(data) == pytest.approx([i / RATE for i in range(24)])
    assert probe_clip(data, "x").duration == pytest.approx(3.0, abs=0.01)
    assert _loud_from(data) == pytest.approx(1.0, abs=1024 / SOUND_RATE)  # within one packet of sound


@pytest.mark.parametrize(
    ("name", "b_frames", "sound", "start", "duration"),
    [
        ("film.mp4", 0, "aac", 1.375, 2.5),  # between two key frames
        ("film.mp4", 3, "aac", 2.0, 2.625),  # its end stands among frames that need later ones
        ("film.mkv", 3, "pcm_s16le", 2.0, 3.0),  # sound that mp4 does not take
    ],
)
def test_cut_anywhere_else_has_the_frames_of_its_span(
    tmp_path: Path, name: str, b_frames: int, sound: str, start: float, duration: float
) -> None:
    path = film(tmp_path / name, b_frames=b_frames, sound=sound)
    data = cut_clip(str(path), start, duration)
    levels = [float(picture.mean()) for picture in _pictures(data)]
    whole = [float(picture.mean()) for picture in _pictures(str(path))]
    expected = whole[round(start * RATE) : round((start + duration) * RATE)]
    assert levels == pytest.approx(expected, abs=0.75)  # a frame is 1.7 from the next
    assert _times(data) == pytest.approx([i / RATE for i in range(len(levels))], abs=0.002)
    info = probe_clip(data, "x")
    assert "mp4" in info.container
    assert info.duration == pytest.approx(duration, abs=0.01)
    assert _loud_from(data) == pytest.approx(3.0 - start, abs=0.002)


def test_cut_between_two_frames_begins_with_the_one_that_is_shown(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4")
    data = cut_clip(str(path), 1.44, 1.0)  # frame 11 is shown from 1.375 s, frame 12 from 1.5 s
    whole = [float(picture.mean()) for picture in _pictures(str(path))]
    assert [float(picture.mean()) for picture in _pictures(data)] == pytest.approx(whole[11:20], abs=0.75)
    assert _times(data)[:3] == pytest.approx([0.0, 0.06, 0.185], abs=0.002)


def test_cut_to_the_end_or_beyond_has_the_frames_up_to_the_end(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4")
    for duration in (None, 100.0):
        assert len(_pictures(cut_clip(str(path), 4.0, duration))) == 16
    assert len(_pictures(cut_clip(str(path), 4.5, None))) == 12


def test_the_same_cut_gives_the_same_bytes(tmp_path: Path) -> None:
    path = str(film(tmp_path / "film.mp4"))
    assert cut_clip(path, 1.375, 2.0) == cut_clip(path, 1.375, 2.0)
    assert cut_clip(path, 2.0, 2.0) == cut_clip(path, 2.0, 2.0)


def test_cut_behind_the_end_or_of_no_video_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4")
    with pytest.raises(DataError, match="ends before the cut at 60 s"):
        cut_clip(str(path), 60.0, 10.0)
    (tmp_path / "text.mp4").write_bytes(b"no video at all" * 100)
    with pytest.raises(DataError, match="cannot be cut"):
        cut_clip(f"{tmp_path}/text.mp4", 0.0, 1.0)
    with pytest.raises(DataError, match="missing"):
        cut_clip(f"{tmp_path}/gone.mp4", 0.0, 1.0)


def test_whole_vggsound_videos_are_cut_when_they_are_built(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    film(videos / "aaaaaaaaaaa.mp4", seconds=16)
    film(videos / "bbbbbbbbbbb.mp4", seconds=4)
    (tmp_path / "vggsound.csv").write_text(
        "aaaaaaaaaaa,5,dog,train\naaaaaaaaaaa,0,cat,test\nbbbbbbbbbbb,2,dog,test\nbbbbbbbbbbb,90,dog,test\n"
    )
    report = build_shards(
        tmp_path / "vggsound.csv", f"{tmp_path}/out", clips_per_shard=4, min_seconds=5.0, videos=videos
    )
    assert [(shard.class_name, shard.split, shard.keys) for shard in report.manifest.shards] == [
        ("dog", "train", ("aaaaaaaaaaa_000005",)),
        ("cat", "test", ("aaaaaaaaaaa_000000",)),
    ]
    assert [(rejection.kind, rejection.reason) for rejection in report.rejected] == [
        ("short", "shorter than 5 s (2.00 s)"),
        ("short", "ends before the cut at 90 s"),
    ]
    shard = report.manifest.shards[0]
    start, size = shard.offsets["mp4"][0], shard.sizes["mp4"][0]
    data = Path(report.manifest.url(0)).read_bytes()[start : start + size]
    assert len(_pictures(data)) == 80
