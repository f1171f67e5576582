"""Decoding of real streams: time stamps, durations, orientation, and formats that change midway."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torchaudio

from avcil_dist.data.decode import DecodedClip, SilentClipError, decode_clip, probe_clip
from avcil_dist.data.sound import lay_out, resample
from avcil_dist.errors import DataError
from tests.helpers.media import frame_number, grey_of, media, step_tones, tone, turned

torch.set_num_threads(1)
RATE = 16_000


def _decode(data: bytes, num_frames: int = 5) -> DecodedClip:
    return decode_clip(data, num_frames=num_frames, sample_rate=RATE, silent="silence", where="clip")


def _numbers(data: bytes, expected: Sequence[int]) -> list[int]:
    frames = _decode(data, len(expected)).frames
    greys = frames[:, 1, frames.shape[-2] // 2, frames.shape[-1] // 2].tolist()
    return [frame_number(grey, number) for grey, number in zip(greys, expected, strict=True)]


def _hertz(waveform: torch.Tensor, begin: float, end: float) -> float:
    part = waveform[round(begin * RATE) : round(end * RATE)].numpy()
    return float(np.abs(np.fft.rfft(part * np.hanning(len(part)), RATE)).argmax())


CONTAINERS = {
    "mp4": ("mp4", {}),
    "mp4 with B-frames": ("mp4", {"b_frames": 3}),
    "mp4 with open GOPs": ("mp4", {"b_frames": 3, "open_gop": True}),
    "fragmented mp4": ("mp4", {"options": {"movflags": "frag_keyframe+empty_moov+delay_moov"}}),
    "mov": ("mov", {"sound": "pcm_s16le"}),
    "matroska": ("matroska", {"b_frames": 2}),
    "webm": ("webm", {"codec": "libvpx", "sound": "libopus", "rate": 48_000}),
    "webm with VP9": ("webm", {"codec": "libvpx-vp9", "sound": "libopus", "rate": 48_000}),
    "ogg": ("ogg", {"codec": "libvpx", "sound": "libopus", "rate": 48_000}),
    "flv": ("flv", {"rate": 44_100}),
    "mpeg-ts": ("mpegts", {"rate": 44_100, "b_frames": 2}),
    "mpeg-ps": ("mpeg", {"codec": "mpeg2video", "sound": "mp2", "rate": 44_100, "fps": 25}),
    "avi": ("avi", {"codec": "mpeg4", "sound": "mp2", "rate": 44_100}),
    "avi with B-frames": ("avi", {"codec": "mpeg4", "sound": "mp2", "rate": 44_100, "b_frames": 2}),
    "avi with H.264": ("avi", {"sound": "mp2", "rate": 44_100, "b_frames": 2}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_and_sound_of_every_container_are_at_their_times(name: str) -> None:
    container, settings = CONTAINERS[name]
    rate, fps = int(settings.get("rate", RATE)), int(settings.get("fps", 10))
    data = media(container, seconds=2.5, samples=step_tones(2.5, rate), **settings)
    assert probe_clip(data, "clip").duration == pytest.approx(2.5, abs=0.07)
    expected = [round((i + 0.5) * 0.5 * fps - 0.5) for i in range(5)]
    assert _numbers(data, expected) == pytest.approx(expected, abs=1 if fps == 10 else 2)
    waveform = _decode(data).waveform
    assert len(waveform) / RATE == pytest.approx(2.5, abs=0.1)
    for step in range(5):
        assert _hertz(waveform, step / 2 + 0.1, step / 2 + 0.4) == pytest.approx(300 + 200 * step, abs=6)


def test_each_frame_is_shown_until_the_next_one_begins() -> None:
    times = [0.0, 0.1, 0.2, 1.2, 1.9]
    for container in ("mp4", "matroska"):
        data = media(container, seconds=2, times=times)
        assert _numbers(data, [2, 2, 3, 3]) == [2, 2, 3, 3]


def test_wrong_declared_duration_is_replaced_by_that_of_the_packets() -> None:
    data = bytearray(media("matroska", seconds=2, sound=None))
    element = data.find(b"\x44\x89\x88")  # Duration, 8 bytes
    assert element > 0
    for declared in (0.5, 60.0):
        data[element + 3 : element + 11] = np.array(declared * 1000, ">f8").tobytes()
        assert probe_clip(bytes(data), "clip").duration == pytest.approx(2.0, abs=0.01)
        assert _numbers(bytes(data), [2, 6, 10, 14, 18]) == [2, 6, 10, 14, 18]


def test_late_sound_begins_after_silence() -> None:
    waveform = _decode(media("mp4", seconds=4, sound_start=1.5)).waveform
    assert len(waveform) / RATE == pytest.approx(4.0, abs=0.1)
    assert not waveform[: round(1.4 * RATE)].any()
    first = int((waveform.abs() > 0.1).nonzero()[0])
    assert first / RATE == pytest.approx(1.5, abs=0.05)


def test_sound_before_the_first_frame_is_left_out() -> None:
    data = media("mov", seconds=2, start=1.0, sound="pcm_s16le", samples=step_tones(3.0, RATE))
    waveform = _decode(data).waveform
    assert len(waveform) / RATE == pytest.approx(2.0, abs=0.01)
    assert _hertz(waveform, 0.1, 0.4) == pytest.approx(700, abs=6)


def test_gap_in_the_sound_is_silence() -> None:
    loud = [_mp2(tone(0.72, 44_100), 44_100, start) for start in (0.0, 1.5)]
    waveform = _decode(_with_sound(loud, seconds=2.5)).waveform
    for begin, end, is_loud in ((0.1, 0.6, True), (0.85, 1.4, False), (1.65, 2.1, True)):
        assert bool(waveform[round(begin * RATE) : round(end * RATE)].abs().max() > 0.1) == is_loud


def test_sound_may_change_rate_and_channels_midway() -> None:
    pieces = [
        _mp2(tone(1.0, 44_100), 44_100, 0.0),
        _mp2(tone(1.0, 48_000, 880), 48_000, 1.0, layout="stereo"),
        _mp2(tone(1.0, 32_000, 660), 32_000, 2.0),
    ]
    waveform = _decode(_with_sound(pieces, seconds=3)).waveform
    assert len(waveform) / RATE == pytest.approx(3.0, abs=0.1)
    for second, hertz in enumerate((440, 880, 660)):
        assert _hertz(waveform, second + 0.2, second + 0.8) == pytest.approx(hertz, abs=6)
        assert waveform[round((second + 0.2) * RATE) : round((second + 0.8) * RATE)].abs().max() > 0.2


def test_frames_may_change_size_and_pixel_format_midway() -> None:
    pieces = []
    for size, pix_fmt, begin in (((64, 48), "yuvj420p", 0), ((96, 80), "yuvj444p", 10)):
        encoder = av.CodecContext.create("mjpeg", "w")
        encoder.width, encoder.height, encoder.pix_fmt = *size, pix_fmt
        encoder.time_base, encoder.framerate = Fraction(1, 1000), Fraction(10)
        packets = []
        for number in range(begin, begin + 10):
            picture = np.full((size[1], size[0], 3), grey_of(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = 100 * number, Fraction(1, 1000)
            packets += encoder.encode(frame)
        pieces.append(packets + list(encoder.encode(None)))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as target:
        stream = target.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for packet in (packet for piece in pieces for packet in piece):
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            target.mux(packet)
    assert _decode(buffer.getvalue()).frames.shape == (5, 3, 48, 64)
    assert _numbers(buffer.getvalue(), [2, 6, 10, 14, 18]) == [2, 6, 10, 14, 18]


@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [
        ((0, 1, -1, 0), (64, 48), (0, -1)),  # a quarter turn clockwise
        ((-1, 0, 0, -1), (48, 64), (-1, -1)),
        ((0, -1, 1, 0), (64, 48), (-1, 0)),
        ((-1, 0, 0, 1), (48, 64), (0, -1)),  # mirrored
    ],
)
def test_frames_are_upright(matrix: Sequence[int], size: tuple[int, int], corner: tuple[int, int]) -> None:
    frame = _decode(turned(media("mp4"), matrix)).frames[0].float()
    assert frame.shape == (3, *size)
    redness = frame[0] - frame[1] - frame[2]
    corners = {(row, column): float(redness[row * 3 or 2, column * 3 or 2]) for row in (0, -1) for column in (0, -1)}
    assert max(corners, key=lambda key: corners[key]) == corner


def test_cover_picture_is_no_video_and_never_chosen() -> None:
    for has_video in (False, True):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as target:
            cover = target.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            streams = {}
            with av.open(io.BytesIO(media("mp4"))) as source:
                for stream in source.streams:
                    if has_video or stream.type == "audio":
                        streams[stream.index] = target.add_stream_from_template(stream)
                picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 250, np.uint8), format="rgb24")
                target.mux([*cover.encode(picture.reformat(format="yuvj420p")), *cover.encode(None)])
                for packet in source.demux():
                    if packet.dts is not None and packet.stream.index in streams:
                        packet.stream = streams[packet.stream.index]
                        target.mux(packet)
        if has_video:
            assert _decode(buffer.getvalue()).frames.shape == (5, 3, 48, 64)
        else:
            with pytest.raises(DataError, match="clip: no video track"):
                _decode(buffer.getvalue())


@pytest.mark.parametrize("layout", ["5.1", "7.1"])
@pytest.mark.parametrize("codec", ["aac", "pcm_f32le"])
def test_sound_of_many_channels_is_their_mean(layout: str, codec: str) -> None:
    data = media("mov", sound=codec, rate=48_000, layout=layout)
    waveform = _decode(data).waveform
    assert float(waveform[2000:-2000].abs().max()) == pytest.approx(0.3, abs=0.03)
    assert _hertz(waveform, 0.5, 1.5) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_sound_of_every_sample_format_is_the_same(codec: str) -> None:
    samples = tone(2.0, RATE)
    waveform = _decode(media("matroska", sound=codec, samples=samples)).waveform.numpy()
    np.testing.assert_allclose(waveform, samples, atol=0.009 if codec == "pcm_u8" else 1e-4)


@pytest.mark.parametrize("rate", [22_254, 44_099, 7_919])
def test_odd_rates_are_resampled_in_little_memory(rate: int) -> None:
    waveform = _decode(media("mov", sound="pcm_s16le", rate=rate)).waveform
    assert len(waveform) == pytest.approx(2 * RATE, abs=32)
    assert _hertz(waveform, 0.5, 1.5) == pytest.approx(440, abs=2)
    assert float(waveform[2000:-2000].abs().max()) == pytest.approx(0.3, abs=0.01)


def test_usual_rates_are_resampled_by_torchaudio() -> None:
    for rate in (8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000):
        wave = torch.randn(rate // 2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(resample(wave, rate, RATE), torchaudio.transforms.Resample(rate, RATE)(wave))


def test_sound_that_is_no_number_is_damage() -> None:
    samples = tone(2.0, RATE)
    samples[100:110] = np.nan
    with pytest.raises(DataError, match="clip: its sound has values that are no number"):
        _decode(media("mov", sound="pcm_f32le", samples=samples))


def test_sound_that_is_elsewhere_than_the_frames_is_none() -> None:
    data = media("mov", seconds=1, start=3.0, sound="pcm_s16le", samples=tone(1.0, RATE))
    assert not _decode(data).waveform.any()
    with pytest.raises(SilentClipError):
        decode_clip(data, num_frames=1, sample_rate=RATE, silent="error", where="clip")


def test_pieces_of_sound_are_laid_out_on_a_clock() -> None:
    ones, twos = np.ones((1, 100), np.float32), np.full((1, 100), 2, np.float32)

    def lay(*starts: float, **settings: float) -> list[float]:
        pieces = list(zip(starts, (ones, twos), strict=False))
        return lay_out(pieces, 1000, **({"limit": 1.0} | settings))[0].tolist()  # type: ignore[arg-type]

    assert lay(0.0, 0.1) == [1] * 100 + [2] * 100
    assert lay(0.02, 0.11) == [1] * 100 + [2] * 100  # rounded time stamps
    assert lay(0.02, 0.11, tolerance=0) == [0] * 20 + [1] * 90 + [1] * 10 + [2] * 90
    assert lay(0.0, 0.2) == [1] * 100 + [0] * 100 + [2] * 100
    assert lay(0.0, 0.05) == [1] * 100 + [2] * 50
    assert lay(-0.05, 0.05) == [1] * 50 + [2] * 100
    assert lay(0.0, 1e9) == [1] * 100  # a wild time stamp costs no memory


def _mp2(samples: np.ndarray, rate: int, start: float, layout: str = "mono") -> list[av.Packet]:
    """Packets of MPEG sound: each of its frames has its own rate and channels."""
    encoder = av.CodecContext.create("mp2", "w")
    encoder.sample_rate, encoder.layout, encoder.format, encoder.bit_rate = rate, layout, "s16", 128_000
    encoder.open()
    channels = av.AudioLayout(layout).nb_channels
    packed = np.ascontiguousarray((np.repeat(samples, channels) * 32767).astype(np.int16)[None])
    frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    resampler = av.AudioResampler("s16", layout, rate, frame_size=encoder.frame_size)
    packets = []
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        packets += encoder.encode(part)
    packets += encoder.encode(None)
    for number, packet in enumerate(packets):
        packet.pts = packet.dts = round(1000 * (start + number * 1152 / rate))
        packet.duration, packet.time_base = round(1000 * 1152 / rate), Fraction(1, 1000)
    return packets


def _with_sound(pieces: list[list[av.Packet]], seconds: float) -> bytes:
    """A Matroska file whose sound is the packets of several encoders."""
    buffer = io.BytesIO()
    pictures = io.BytesIO(media("mp4", seconds=seconds, sound=None))
    with av.open(pictures) as source, av.open(buffer, "w", format="matroska") as target:
        video = target.add_stream_from_template(source.streams.video[0])
        audio = target.add_stream("mp2", rate=44_100, layout="mono")
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        for packet in packets:
            packet.stream = video
        for packet in (packet for piece in pieces for packet in piece):
            packet.stream = audio
            packets.append(packet)
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            target.mux(packet)
    return buffer.getvalue()
