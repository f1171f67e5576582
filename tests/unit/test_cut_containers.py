"""Cuts of any container have the frames and the sound of their interval."""

import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avcil_dist.data.decode import decode_clip, probe_clip
from data_shards.build import build_shards
from data_shards.cut import cut_clip
from tests.helpers.media import SPEEDS, frame_number, media, step_tones, tone, turned
from tests.unit.test_decode_streams import CONTAINERS

torch.set_num_threads(1)
RATE, SECONDS, SPANS = 16_000, 6.0, 9
COLOUR = (200, 60, 20)
SOURCES = {
    **CONTAINERS,
    "mp4 with one GOP": ("mp4", {"b_frames": 2, "gop": 250}),
    "mpeg-ts with long GOPs": ("mpegts", {"rate": 44_100, "gop": 50}),
    "mpeg-ts with one GOP": ("mpegts", {"rate": 44_100, "gop": 250, "b_frames": 2}),
    "mpeg-ts with open GOPs": ("mpegts", {"rate": 44_100, "gop": 25, "b_frames": 3, "open_gop": True}),
    "mpeg-ps with B-frames": (
        "mpeg",
        {"codec": "mpeg2video", "sound": "mp2", "rate": 44_100, "fps": 25, "b_frames": 2},
    ),
}


def _check(data: bytes, start: float, end: float, fps: int, frames_off: int) -> None:
    """Check frames and tones of a cut of `step_tones` media."""
    assert "mp4" in probe_clip(data, "cut").container
    duration = probe_clip(data, "cut").duration
    assert duration == pytest.approx(end - start, abs=1 / fps + 0.03)
    clip = decode_clip(data, num_frames=SPANS, sample_rate=RATE, silent="error", where="cut")
    greys = clip.frames[:, 1, clip.frames.shape[-2] // 2, clip.frames.shape[-1] // 2].tolist()
    for span, grey in enumerate(greys):
        expected = min((start + (span + 0.5) * duration / SPANS) * fps, SECONDS * fps - 1)
        assert abs(frame_number(grey, expected) + 0.5 - expected) <= frames_off + 0.6
    wave = clip.waveform.numpy()
    assert len(wave) / RATE == pytest.approx(end - start, abs=0.13)
    for half in range(int(2 * start), int(2 * end) + 1):
        first, last = max(half / 2, start) + 0.05, min(half / 2 + 0.5, end) - 0.05
        if last - first > 0.15:  # ± 50 ms: within, there is one tone
            part = wave[round((first - start) * RATE) : round((last - start) * RATE)]
            spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), RATE))
            assert spectrum.argmax() == pytest.approx(300 + 200 * half, abs=20)
            assert np.abs(part).max() > 0.15


@pytest.mark.parametrize("name", SOURCES)
def test_cut_has_the_frames_and_the_sound_of_its_interval(tmp_path: Path, name: str) -> None:
    container, settings = SOURCES[name]
    rate, fps = int(settings.get("rate", RATE)), int(settings.get("fps", 10))
    path = tmp_path / "film"
    path.write_bytes(media(container, seconds=SECONDS, samples=step_tones(SECONDS, rate), **settings))
    random = np.random.default_rng(len(name))
    starts = [0.0, 2.5, *random.uniform(0.2, 4.5, 2).round(3)]
    for start, duration in zip(starts, (2.0, 1.0, 1.5, 9.0), strict=True):
        data = cut_clip(str(path), start, duration)
        _check(data, start, min(start + duration, SECONDS), fps, 1 if fps == 10 else 2)


def test_cuts_between_two_ticks_have_all_their_frames(tmp_path: Path) -> None:
    path = tmp_path / "film.webm"
    path.write_bytes(media("webm", seconds=4, fps=30, gop=30, codec="libvpx", sound="libopus", rate=48_000))
    for number in (3, 5, 8, 20, 35, 50):
        data = cut_clip(str(path), round(number / 30, 5), 1.0)
        assert probe_clip(data, "cut").duration == pytest.approx(1.0, abs=1 / 30)
        clip = decode_clip(data, num_frames=5, sample_rate=RATE, silent="error", where="cut")
        grey = float(clip.frames[0, 1, 24, 32])
        assert abs(frame_number(grey, number + 3) - (number + 3)) <= 1


@pytest.mark.parametrize("start", [0.0, 1.25])  # copied; encoded again
def test_frames_of_a_cut_are_upright_once(tmp_path: Path, start: float) -> None:
    path = tmp_path / "phone.mp4"
    path.write_bytes(turned(media("mp4", seconds=3)))
    frame = decode_clip(cut_clip(str(path), start, 1.0), num_frames=1, sample_rate=RATE, silent="error", where="cut")
    picture = frame.frames[0].float()
    assert picture.shape == (3, 64, 48)
    redness = picture[0] - picture[1] - picture[2]
    assert redness[3, -3] > 100
    assert max(float(redness[3, 3]), float(redness[-3, 3]), float(redness[-3, -3])) < 50


def test_last_frame_of_a_cut_is_shown_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "slides.mp4"
    path.write_bytes(media("mp4", seconds=8, times=[0.0, 2.0, 2.5, 6.0, 8.0]))
    data = cut_clip(str(path), 1.0, 4.0)
    assert probe_clip(data, "cut").duration == pytest.approx(4.0, abs=0.02)
    clip = decode_clip(data, num_frames=8, sample_rate=RATE, silent="error", where="cut")
    numbers = [frame_number(grey, 1) for grey in clip.frames[:, 1, 24, 32].tolist()]
    assert numbers == [0, 0, 1, 2, 2, 2, 2, 2]


def test_sound_that_begins_late_is_silent_before_it_in_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "late.mp4"
    path.write_bytes(media("mp4", seconds=5, sound_start=2.5, samples=tone(2.5, RATE)))
    for start in (1.25, 1.2):  # between two frames, and at a key frame
        data = cut_clip(str(path), start, 2.0)
        waveform = decode_clip(data, num_frames=1, sample_rate=RATE, silent="error", where="cut").waveform
        first = int((waveform.abs() > 0.1).nonzero()[0])
        assert first / RATE == pytest.approx(2.5 - start, abs=0.07)


def test_path_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "2024-01-05T12:30:00.mp4").write_bytes(media("mp4", seconds=3, gop=10))
    (tmp_path / "clips.csv").write_text("path,label,split,start,duration\n2024-01-05T12:30:00.mp4,dog,train,1,1\n")
    monkeypatch.chdir(tmp_path)
    report = build_shards(Path("clips.csv"), os.fspath(tmp_path / "out"), clips_per_shard=2, min_seconds=0.5)
    assert [shard.count for shard in report.manifest.shards] == [1]


def _coloured(codec: str, colour_range: int, matrix: int) -> bytes:
    """A film of one colour, in limited (1) or full (2) range, with the matrix of BT.709 (1) or BT.601 (5)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as target:
        video = target.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.options = SPEEDS[codec]
        context = video.codec_context
        context.color_range, context.colorspace = colour_range, matrix
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), COLOUR, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_color_range=colour_range, dst_colorspace=matrix)
            frame.pts, frame.color_range = number, colour_range
            target.mux(video.encode(frame))
        target.mux(video.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("matrix", [1, 5])
@pytest.mark.parametrize("colour_range", [1, 2])
@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_cut_has_the_colours_of_its_file(tmp_path: Path, codec: str, colour_range: int, matrix: int) -> None:
    path = tmp_path / "film.mkv"
    path.write_bytes(_coloured(codec, colour_range, matrix))
    for data in (path.read_bytes(), cut_clip(str(path), 0.35, 1.0)):
        frames = decode_clip(data, num_frames=1, sample_rate=RATE, silent="silence", where="film").frames
        assert frames[0, :, 24, 32].tolist() == pytest.approx(COLOUR, abs=4)
