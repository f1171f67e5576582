"""Cuts: a time span of a video file as an mp4 clip.

If a key frame is at the start, and the frames of the span are the next ones in the file, its packets are copied.
Otherwise the span is decoded and encoded again (H.264, AAC): the frames are those shown from `start` to before
`start + duration`, at their own times, and the sound is exact to the sample. Copied sound begins at the next packet,
at most some 25 ms later; it stays in step.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from avcil_dist.data.decode import CONTAINERS
from avcil_dist.errors import DataError
from data_shards.rejections import ClipRejectedError

COPIED_VIDEO, COPIED_AUDIO = {"h264", "hevc", "mpeg4"}, {"aac", "mp3"}
AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}
CLOSE = 1e-4  # seconds; time stamps are rounded
QUALITY = {"preset": "veryfast", "crf": "18"}


def cut_clip(path: str, start: float, duration: float | None) -> bytes:
    """Cut the file from `start` seconds on, for `duration` seconds or to the end. Returns the bytes of an mp4.

    The same file and times give the same bytes. Raises DataError for a file that cannot be read, or that ends
    before `start`.
    """
    end = math.inf if duration is None else start + duration
    with _opened(path) as container:
        span = _Span(container, start, end, path)
        packets = span.packets()
        if not any(packet.stream is span.video for packet in packets):
            raise ClipRejectedError("short", f"{path}: ends before the cut at {start:g} s")
        if _can_copy(span, packets):
            return _copied(span, packets)
        return _encoded(span, packets, path)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    container = None
    try:
        container = av.open(path, options={"format_whitelist": CONTAINERS}, metadata_errors="ignore")
        yield container
    except FileNotFoundError:
        raise DataError(f"{path}: missing file") from None
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be cut ({getattr(error, 'strerror', None) or error})") from None
    finally:
        if container is not None:
            container.close()


@dataclass
class _Span:
    """A time span of a container, in seconds from the container's beginning."""

    container: Any
    start: float
    end: float
    path: str

    def __post_init__(self) -> None:
        if not self.container.streams.video:
            raise DataError(f"{self.path}: no video track")
        self.video = self.container.streams.video[0]
        self.audio = self.container.streams.audio[0] if self.container.streams.audio else None
        for stream in self.streams:
            if stream.codec_context is None:
                raise DataError(f"{self.path}: no decoder for its {stream.type} track")
            stream.thread_count = 1
        self.origin = (self.container.start_time or 0) / av.time_base

    @property
    def streams(self) -> list[Any]:
        return [stream for stream in (self.video, self.audio) if stream is not None]

    def time(self, stamped: Any, stream: Any) -> float:
        """Presentation time of a packet or frame, in seconds from the container's beginning."""
        return float(stamped.pts * stream.time_base) - self.origin

    def packets(self) -> list[Any]:
        """All packets from the key frame at or before the start to the end, in the file's order."""
        self.container.seek(int((self.start + self.origin) * av.time_base), backward=True)
        packets, is_open = [], {stream.index for stream in self.streams}
        for packet in self.container.demux(*self.streams):
            stamp = packet.pts if packet.dts is None else packet.dts  # some containers lack one of them
            if stamp is not None and float(stamp * packet.time_base) - self.origin >= self.end:
                is_open.discard(packet.stream.index)
                if not is_open:
                    break
            elif packet.size and packet.stream.index in is_open:
                packets.append(packet)
        return packets


def _can_copy(span: _Span, packets: list[Any]) -> bool:
    codecs = span.video.codec_context.name, span.audio.codec_context.name if span.audio else "aac"
    if codecs[0] not in COPIED_VIDEO or codecs[1] not in COPIED_AUDIO:
        return False
    if any(packet.pts is None or packet.dts is None for packet in packets):
        return False
    video = [packet for packet in packets if packet.stream is span.video]
    half_frame = 0.5 / float(span.video.average_rate or 25)
    if not video[0].is_keyframe or abs(span.time(video[0], span.video) - span.start) > half_frame:
        return False
    # frames before the end may refer to a frame shown after it: then all are encoded again
    first = span.time(video[0], span.video)
    return all(first <= span.time(packet, span.video) < span.end - CLOSE for packet in video)


def _copied(span: _Span, packets: list[Any]) -> bytes:
    first = next(packet for packet in packets if packet.stream is span.video)
    begin = float(first.pts * first.time_base)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as target:
        outputs = {stream.index: target.add_stream_from_template(stream) for stream in span.streams}
        for packet in packets:
            shift = round(begin / packet.time_base)
            if (
                packet.stream is not span.video
                and not shift <= packet.pts < (span.end + span.origin) / packet.time_base
            ):
                continue
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = outputs[packet.stream.index]
            target.mux(packet)
    return buffer.getvalue()


def _encoded(span: _Span, packets: list[Any], path: str) -> bytes:
    pictures = _pictures(span, packets)
    if not pictures:
        raise ClipRejectedError("short", f"{path}: ends before the cut at {span.start:g} s")
    sound = _Sound(span, packets)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as target:
        video: Any = target.add_stream("libx264", rate=span.video.average_rate or 25)
        video.width, video.height = pictures[0].width // 2 * 2, pictures[0].height // 2 * 2
        video.pix_fmt, video.thread_count, video.options = "yuv420p", 1, QUALITY
        video.codec_context.time_base = span.video.time_base
        audio: Any = None
        if sound.samples.size:
            audio = target.add_stream("aac", rate=sound.rate, layout=sound.layout)
        reformatter = av.video.reformatter.VideoReformatter()
        begin = round((span.start + span.origin) / span.video.time_base)
        for number, picture in enumerate(pictures):
            frame = reformatter.reformat(picture, width=video.width, height=video.height, format="yuv420p", threads=1)
            # the first frame is the one shown at the start, which may begin earlier
            frame.pts = max(picture.pts - begin, 0) if number else 0
            frame.time_base, frame.pict_type = span.video.time_base, av.video.frame.PictureType.NONE
            target.mux(video.encode(frame))
        target.mux(video.encode(None))
        if audio:
            block = av.AudioFrame.from_ndarray(sound.samples, format="fltp", layout=sound.layout)
            # with a time stamp, the encoder records how many samples it puts in front, and players skip them
            block.sample_rate, block.pts, block.time_base = sound.rate, 0, Fraction(1, sound.rate)
            target.mux(audio.encode(block))
            target.mux(audio.encode(None))
    return buffer.getvalue()


def _pictures(span: _Span, packets: list[Any]) -> list[Any]:
    """The frames shown within the span; the first is the one shown at its start."""
    shown: list[Any] = []
    for frame in _frames(span.video, packets):
        if frame.pts is None or span.time(frame, span.video) >= span.end - CLOSE:
            continue
        if span.time(frame, span.video) <= span.start + CLOSE:
            shown.clear()
        shown.append(frame)
    last = span.time(shown[-1], span.video) + 1 / float(span.video.average_rate or 25) if shown else 0.0
    return shown if last > span.start + CLOSE else []


class _Sound:
    """The samples of the span, (channels, samples) float32, exact to the sample."""

    def __init__(self, span: _Span, packets: list[Any]) -> None:
        self.samples = np.zeros((1, 0), dtype=np.float32)
        if span.audio is None:
            return
        context = span.audio.codec_context
        self.rate = context.sample_rate if context.sample_rate in AAC_RATES else 48_000
        self.layout = "mono" if context.channels == 1 else "stereo"
        resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
        parts, begin = [], None
        for frame in _frames(span.audio, packets):
            begin = span.time(frame, span.audio) if begin is None and frame.pts is not None else begin
            parts += [part.to_ndarray() for part in resampler.resample(frame)]
        parts += [part.to_ndarray() for part in resampler.resample(None)] if parts else []
        samples = np.concatenate(parts, axis=1) if parts else self.samples
        lead = round((span.start - (begin or 0.0)) * self.rate)
        samples = samples[:, lead:] if lead >= 0 else np.pad(samples, ((0, 0), (-lead, 0)))
        if math.isfinite(span.end):
            samples = samples[:, : round((span.end - span.start) * self.rate)]
        self.samples = np.ascontiguousarray(samples)


def _frames(stream: Any, packets: list[Any]) -> Iterator[Any]:
    for packet in packets:
        if packet.stream is stream:
            yield from packet.decode()
    yield from stream.codec_context.decode(None)
