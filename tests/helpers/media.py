"""Made video files with a known answer, in any container: frame i has the grey `grey_of(i)`, the sound is a tone."""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

H264 = {"preset": "ultrafast", "crf": "12"}
VPX = {"deadline": "realtime", "cpu-used": "8", "b": "400k"}
SPEEDS = {
    "libx264": H264,
    "libx265": {"preset": "ultrafast", "crf": "12", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "10", "crf": "8", "svtav1-params": "lp=1"},
    "libvpx": VPX,
    "libvpx-vp9": VPX,
    "ffv1": {},
    "png": {},
}


def grey_of(number: int) -> int:
    """The grey of frame `number`; two frames differ by 5 a frame, up to 20 frames apart."""
    return 18 + 5 * (number % 44)


def tone(seconds: float, rate: int, hertz: float = 440.0, level: float = 0.3) -> np.ndarray:
    """A sine (samples,) float32."""
    times = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def media(
    container: str = "mp4",
    *,
    seconds: float = 2.0,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 0,
    first: int = 0,
    start: float = 0.0,
    times: Sequence[float] = (),
    sound: str | None = "aac",
    rate: int = 16_000,
    layout: str = "mono",
    samples: np.ndarray | None = None,
    sound_start: float = 0.0,
    open_gop: bool = False,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> bytes:
    """A file of `seconds`, its first frame of number `first` and at second `start`; `times` are other frame times.

    `samples` (samples,) is the sound of every channel, from `sound_start` on; by default a tone of 440 Hz to the end.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, container_options=options or {}) as target:
        video = target.add_stream(codec, rate=fps)
        video.width, video.height, video.pix_fmt = *size, pix_fmt
        video.codec_context.time_base = Fraction(1, 1000 if times else fps)
        if codec not in SPEEDS:
            video.bit_rate = 4_000_000
        video.options = SPEEDS.get(codec, {}) | {"g": str(gop)} | ({"bf": str(b_frames)} if b_frames else {})
        if codec == "libx264":
            video.options |= {"x264-params": f"open-gop={int(open_gop)}"}
        packets = []
        stamps = times or [start + number / fps for number in range(round(seconds * fps))]
        for number, second in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(_picture(grey_of(first + number), size), format="rgb24")
            frame.time_base = video.codec_context.time_base
            frame.pts = round(second / frame.time_base)
            packets += video.encode(frame)
        packets += video.encode(None)
        if sound:
            if samples is None:
                samples = tone(start + seconds - sound_start, rate)
            audio = target.add_stream(sound, rate=rate, layout=layout)
            audio.options = {"strict": "-2"}  # some encoders count as experiments
            packets += _sound_packets(audio, samples, rate, sound_start)
        for packet in sorted(packets, key=lambda packet: float((packet.dts or 0) * packet.time_base)):
            target.mux(packet)
    return buffer.getvalue()


def turned(data: bytes, matrix: Sequence[int] = (0, 1, -1, 0)) -> bytes:
    """An mp4 with the display matrix (a, b, c, d), as phones write it; by default a quarter turn clockwise."""
    changed = bytearray(data)
    header = changed.find(b"tkhd")
    while not int.from_bytes(changed[header + 80 : header + 84], "big"):  # the width; 0 for sound
        header = changed.find(b"tkhd", header + 4)
    a, b, c, d = (number * (1 << 16) for number in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    changed[header + 44 : header + 80] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    return bytes(changed)


def _picture(grey: int, size: tuple[int, int]) -> np.ndarray:
    """Grey with a red corner at the top left and a blue one at the bottom right."""
    width, height = size
    picture = np.full((height, width, 3), grey, np.uint8)
    picture[: height // 3, : width // 3] = 255, 0, 0
    picture[-height // 3 :, -width // 3 :] = 0, 0, 255
    return picture


def _sound_packets(stream: av.AudioStream, samples: np.ndarray, rate: int, start: float) -> Iterator[av.Packet]:
    channels = av.AudioLayout(stream.codec_context.layout.name).nb_channels
    packed = np.ascontiguousarray(np.repeat(samples, channels)[None])
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=stream.codec_context.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
    context = stream.codec_context
    resampler = av.AudioResampler(context.format, context.layout, rate, frame_size=context.frame_size or None)
    for part in (*resampler.resample(frame), *resampler.resample(None)):
        yield from stream.encode(part)
    yield from stream.encode(None)


def frame_number(grey: float, near: float) -> int:
    """The number of the frame with this grey that is nearest to number `near`."""
    numbers = range(max(int(near) - 20, 0), int(near) + 21)
    return min(numbers, key=lambda number: (abs(grey_of(number) - grey), abs(number - near)))


def step_tones(seconds: float, rate: int) -> np.ndarray:
    """A sine (samples,) float32 whose pitch rises by 200 Hz every half second, from 300 Hz on."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (300 + 200 * np.floor(2 * times)) * times)).astype(np.float32)
