"""Made media files over containers, codecs, rates, layouts and faults, each with a known answer.

Frame i of a file has the grey `grey_of(i)` and begins at i / fps; the pitch of its sound rises by 200 Hz every half
second, from 300 Hz on.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import pytest

from avcil_dist.data.decode import DecodedClip
from tests.helpers.media import frame_number, media, step_tones, tone

SECONDS, RATE, SPANS = 4.0, 16_000, 7
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+delay_moov"}


@dataclass(frozen=True)
class MadeFile:
    """A container and the settings of `media`. `frames_off`: how far a lossy codec may mistake a grey."""

    container: str
    settings: dict[str, Any] = field(default_factory=dict)
    frames_off: int = 1
    has_index_in_front: bool = False

    @property
    def fps(self) -> int:
        return int(self.settings.get("fps", 10))

    @property
    def rate(self) -> int:
        return int(self.settings.get("rate", RATE))

    def make(self) -> bytes:
        """The bytes of the file."""
        samples = step_tones(SECONDS, self.rate)
        data = media(self.container, seconds=SECONDS, samples=samples, **self.settings)
        return index_in_front(data) if self.has_index_in_front else data


def _opus(**settings: Any) -> dict[str, Any]:
    return {"sound": "libopus", "rate": 48_000} | settings


def _mp2(**settings: Any) -> dict[str, Any]:
    return {"sound": "mp2", "rate": 44_100} | settings


GOOD = {
    "mp4": MadeFile("mp4"),
    "mp4 with B-frames": MadeFile("mp4", {"b_frames": 3, "rate": 44_100, "layout": "stereo"}),
    "mp4 with open GOPs": MadeFile("mp4", {"b_frames": 3, "open_gop": True, "rate": 48_000}),
    "mp4 of one GOP": MadeFile("mp4", {"b_frames": 2, "gop": 250, "rate": 22_050}),
    "mp4 of key frames": MadeFile("mp4", {"gop": 1, "rate": 32_000}),
    "mp4 with its index in front": MadeFile("mp4", {"rate": 8000}, has_index_in_front=True),
    "mp4, 5.1": MadeFile("mp4", {"layout": "5.1", "rate": 48_000}),
    "mp4, 7.1": MadeFile("mp4", {"layout": "7.1", "rate": 48_000}),
    "mp4, 50 frames per second": MadeFile("mp4", {"fps": 50, "b_frames": 3, "rate": 11_025}, 3),
    "mp4, mp3": MadeFile("mp4", {"sound": "libmp3lame", "rate": 44_100, "layout": "stereo"}),
    "mp4, ac3": MadeFile("mp4", {"sound": "ac3", "rate": 48_000, "layout": "stereo"}),
    "mp4, opus": MadeFile("mp4", _opus()),
    "mp4, flac": MadeFile("mp4", {"sound": "flac", "rate": 44_100}),
    "mp4, MPEG-4": MadeFile("mp4", {"codec": "mpeg4", "rate": 24_000}),
    "mp4, HEVC": MadeFile("mp4", {"codec": "libx265"}),
    "mp4, VP9": MadeFile("mp4", {"codec": "libvpx-vp9"}),
    "mp4, AV1": MadeFile("mp4", {"codec": "libsvtav1", "size": (128, 96)}, 2),
    "fragmented mp4": MadeFile("mp4", {"options": FRAGMENTS, "rate": 44_100}),
    "fragmented mp4 with B-frames": MadeFile("mp4", {"options": FRAGMENTS, "b_frames": 3, "rate": 48_000}),
    "mov, 24 bits": MadeFile("mov", {"sound": "pcm_s24le", "rate": 48_000, "layout": "stereo"}),
    "mov, 22,254 Hz": MadeFile("mov", {"sound": "pcm_s16le", "rate": 22_254}),
    "mov, 44,099 Hz": MadeFile("mov", {"sound": "pcm_f32le", "rate": 44_099}),
    "mov, 8 bits": MadeFile("mov", {"sound": "pcm_u8", "rate": 11_025}),
    "mov, ALAC": MadeFile("mov", {"sound": "alac", "rate": 44_100, "layout": "stereo"}),
    "mov, ProRes": MadeFile("mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le", "sound": "pcm_s16le"}),
    "mov, pictures": MadeFile("mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "sound": "pcm_s16le"}),
    "matroska": MadeFile("matroska", {"b_frames": 2}),
    "matroska, flac": MadeFile("matroska", {"sound": "flac", "rate": 96_000, "layout": "stereo"}),
    "matroska, ffv1": MadeFile("matroska", {"codec": "ffv1", "sound": "pcm_s16le", "rate": 32_000}),
    "mov, png": MadeFile("mov", {"codec": "png", "pix_fmt": "rgb24", "sound": "pcm_s16le"}),
    "matroska, HEVC": MadeFile("matroska", {"codec": "libx265", "b_frames": 2, "sound": "eac3", "rate": 48_000}),
    "webm": MadeFile("webm", _opus(codec="libvpx")),
    "webm, 30 frames per second": MadeFile("webm", _opus(codec="libvpx", fps=30, gop=30), 2),
    "webm, VP9": MadeFile("webm", _opus(codec="libvpx-vp9", layout="stereo")),
    "webm, vorbis": MadeFile("webm", {"codec": "libvpx", "sound": "vorbis", "rate": 44_100, "layout": "stereo"}),
    "webm, AV1": MadeFile("webm", _opus(codec="libsvtav1", size=(128, 96)), 2),
    "ogg": MadeFile("ogg", _opus(codec="libvpx")),
    "flv": MadeFile("flv", {"rate": 44_100}),
    "flv, Sorenson": MadeFile("flv", {"codec": "flv", "sound": "libmp3lame", "rate": 44_100}),
    "mpeg-ts": MadeFile("mpegts", {"rate": 44_100, "b_frames": 2}),
    "mpeg-ts of one GOP": MadeFile("mpegts", {"rate": 44_100, "gop": 250, "b_frames": 2}),
    "mpeg-ts with open GOPs": MadeFile("mpegts", {"rate": 48_000, "gop": 25, "b_frames": 3, "open_gop": True}),
    "mpeg-ts, MPEG-2": MadeFile("mpegts", _mp2(codec="mpeg2video", fps=25), 2),
    "mpeg-ts, HEVC": MadeFile("mpegts", {"codec": "libx265", "sound": "ac3", "rate": 48_000}),
    "mpeg-ps": MadeFile("mpeg", _mp2(codec="mpeg2video", fps=25), 2),
    "mpeg-ps, MPEG-1": MadeFile("mpeg", _mp2(codec="mpeg1video", fps=25), 2),
    "mpeg-ps with B-frames": MadeFile("mpeg", _mp2(codec="mpeg2video", fps=25, b_frames=2), 2),
    "avi": MadeFile("avi", _mp2(codec="mpeg4")),
    "avi with B-frames": MadeFile("avi", _mp2(codec="mpeg4", b_frames=2)),
    "avi, H.264": MadeFile("avi", _mp2(b_frames=2)),
    "avi, pictures": MadeFile("avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "sound": "pcm_s16le"}),
    "asf": MadeFile("asf", {"codec": "wmv2", "sound": "libmp3lame", "rate": 44_100}),
}
assert len(GOOD) >= 40


def index_in_front(data: bytes) -> bytes:
    """The same mp4, with its index before its packets."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(io.BytesIO(data)) as source, av.open(file.name, "w", options={"movflags": "faststart"}) as target:
            streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    target.mux(packet)
        moved = file.read()
    assert moved.find(b"moov") < moved.find(b"mdat")
    return moved


def _sound_alone() -> bytes:
    return _without(media("mp4", seconds=1), "video")


def _without(data: bytes, kind: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams if s.type != kind}
        for packet in source.demux():
            if packet.dts is not None and packet.stream.index in streams:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return buffer.getvalue()


def _not_a_number() -> bytes:
    samples = tone(1, RATE)
    samples[100:110] = np.nan
    return media("mov", seconds=1, sound="pcm_f32le", samples=samples)


# faulty files, each with a part of the reason for which it is rejected
FAULTY: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"this is no video\n" * 100, "not a video"),
    "page": (lambda: b"<!doctype html><html><body>sign in</body></html>" * 50, "not a video"),
    "playlist": (lambda: b"#EXTM3U\n/etc/hostname\n", "not a video"),
    "cut before its index": (lambda: media("mp4", seconds=2)[:6000], "not a video, or cut before its index"),
    "cut with its index in front": (
        lambda: index_in_front(media("mp4", seconds=2))[:-3000],
        "truncated or corrupt",
    ),
    "no picture": (_sound_alone, "no video track"),
    "no sound": (lambda: media("mp4", seconds=1, sound=None), "no audio track"),
    "sound that is no number": (_not_a_number, "values that are no number"),
    "too wide": (lambda: media("mp4", seconds=0.5, size=(1024, 16)), "at most 20 to 1"),
    "too fast sound": (lambda: media("mov", seconds=1, sound="pcm_s16le", rate=900_000), "at most 768,000 Hz"),
    "too long": (lambda: media("mp4", seconds=1, times=[0.0, 0.5, 5000.0]), "at most 3,600 s"),
}


def assert_interval(clip: DecodedClip, start: float, end: float, made: MadeFile, where: str = "") -> None:
    """Check that a clip shows a file's pictures (± one frame) and tones (± 50 ms) from `start` to `end` seconds."""
    greys = clip.frames[:, 1, clip.frames.shape[-2] // 2, clip.frames.shape[-1] // 2].tolist()
    assert_pictures(greys, start, end, made, where)
    waveform = clip.waveform.numpy()
    # encoders fill their last frame up, and AAC may add another
    assert len(waveform) / RATE == pytest.approx(end - start, abs=0.05 + 2048 / made.rate), where
    for half in range(int(2 * start), int(2 * end) + 1):
        first, last = max(half / 2, start) + 0.05, min(half / 2 + 0.5, end) - 0.05
        if last - first > 0.15:
            part = waveform[round((first - start) * RATE) : round((last - start) * RATE)]
            spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), RATE))
            assert spectrum.argmax() == pytest.approx(300 + 200 * half, abs=20), f"{where}: tone at {first:.2f} s"
            assert np.abs(part).max() > 0.15, f"{where}: no tone at {first:.2f} s"


def assert_pictures(greys: list[int], start: float, end: float, made: MadeFile, where: str = "") -> None:
    """Check the greys of the middles of equal spans from `start` to `end` seconds."""
    for span, grey in enumerate(greys):
        expected = min((start + (span + 0.5) * (end - start) / len(greys)) * made.fps, SECONDS * made.fps - 1)
        number = frame_number(grey, expected)
        assert abs(number + 0.5 - expected) <= made.frames_off + 0.6, f"{where}: span {span} shows frame {number}"
