"""Cuts: a time span of a video file as an mp4 clip.

If a key frame is at the start, and the frames of the span are the next ones in the file, its packets are copied.
Otherwise the span is decoded and encoded again (H.264, AAC): the frames are those shown from `start` to before
`start + duration`, upright and at their own times, and the sound is exact to the sample. Copied sound begins at the
next packet, at most some 25 ms later; it stays in step.

A seek is a hint only: in containers without an index it may end anywhere. So the first frame is decoded, and if it
is later than the start, the seek is repeated to an earlier time, at last from the beginning of the file.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from avcil_dist.data.clip_bounds import check_length
from avcil_dist.data.container_claims import check_claims
from avcil_dist.data.decode import CONTAINERS, FORMATS_WITHOUT_TIMES, decode_packets, video_stream
from avcil_dist.data.frames import Orientation, presentation_time
from avcil_dist.data.sound import SoundRun, lay_out, sound_runs
from avcil_dist.errors import DataError
from data_shards.rejections import ClipRejectedError

COPIED_VIDEO, COPIED_AUDIO = {"h264", "hevc", "mpeg4"}, {"aac", "mp3"}
AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}
CLOSE = 1e-3  # seconds; time stamps are rounded, in Matroska to 1 ms
COPY_SHIFT = 0.02  # seconds that a copied key frame may be off the start
SEEK_BACK = 2.0  # seconds before the start of the second seek; doubled for each further seek
INTERLEAVING = 10.0  # seconds that packets of one time may be apart in a file
REORDERING = 1.0  # seconds between the decoding and the presentation of a frame, at most
FORMATS_WITHOUT_SEEK = ("mpeg",)  # few of its packets have time stamps; after a seek, those of the others are wrong
USUAL_RATES = (1, 240)  # frames per second; other average rates are no frame rate
FULL_RANGE = av.video.reformatter.ColorRange.JPEG
UNSPECIFIED = 2  # the number of a missing colour tag, ISO/IEC 23091-2
TICK = Fraction(1, 90_000)  # seconds; exact for the usual frame rates and for Matroska's ms
QUALITY = {"preset": "veryfast", "crf": "18", "bf": "0"}


def cut_clip(path: str, start: float, duration: float | None) -> bytes:
    """Cut the file from `start` seconds on, for `duration` seconds or to the end. Returns the bytes of an mp4.

    The same file and times give the same bytes. Raises DataError for a file that cannot be read, that ends
    before `start`, or of which the cut is beyond a bound (`clip_bounds.py`).
    """
    end = math.inf if duration is None else start + duration
    for target in _seek_times(start):
        with _opened(path) as container:
            span = _Span(container, start, end, path)
            packets = span.packets(target)
            num_pictures = sum(packet.stream is span.video for packet in packets)
            check_length(0.0, num_pictures, span.video.width * span.video.height, path)
            if target is None or span.covers_start(packets):
                copied = _packets_to_copy(span, packets)
                return _copied(span, copied) if copied else _encoded(span, packets)
    raise AssertionError("the last attempt reads from the beginning")


def _seek_times(start: float) -> Iterator[float | None]:
    """Times to seek to, each earlier than the one before; at last None, the beginning of the file without a seek."""
    target, step = start, SEEK_BACK
    while target > 0:
        yield target
        target, step = target - step, 2 * step
    yield None


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    container = None
    url = f"file:{Path(path).absolute()}"  # without a protocol, ffmpeg takes the text before a colon for one
    try:
        with Path(path).open("rb") as file:
            check_claims(file, path)
        container = av.open(url, options={"format_whitelist": CONTAINERS}, metadata_errors="ignore")
        yield container
    except FileNotFoundError:
        raise DataError(f"{path}: missing file") from None
    except (av.FFmpegError, OSError, ValueError, EOFError, MemoryError) as error:
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
        self.video = video_stream(self.container, self.path)
        self.audio = self.container.streams.audio[0] if self.container.streams.audio else None
        self.origin = (self.container.start_time or 0) / av.time_base
        self.format = self.container.format.name
        average = self.video.average_rate or Fraction(0)
        self.frame_rate = average if USUAL_RATES[0] <= average <= USUAL_RATES[1] else Fraction(25)

    @property
    def streams(self) -> list[Any]:
        return [stream for stream in (self.video, self.audio) if stream is not None]

    def time(self, stamped: Any) -> float | None:
        """Presentation time of a packet or frame from the container's beginning; None without any time stamp."""
        time = presentation_time(stamped)
        return None if time is None else time - self.origin

    def packets(self, target: float | None) -> list[Any]:
        """The packets from about `target`, or from the beginning of the file, to the end, in the file's order."""
        packets, is_open = list[Any](), {stream.index for stream in self.streams}
        if target is not None and not self._seek(target):
            return []
        for packet in self.container.demux(*self.streams):
            stamp = packet.pts if packet.dts is None else packet.dts  # some containers lack one of them
            if stamp is None or not packet.size:
                continue
            time = float(stamp * packet.time_base) - self.origin
            check_length(time - self.start if time < self.end else 0.0, 0, 0, self.path)
            is_video = packet.stream is self.video
            # without presentation times, frames before the end may be in packets after it
            if time >= self.end + (REORDERING if is_video and self.format in FORMATS_WITHOUT_TIMES else 0):
                is_open.discard(packet.stream.index)
                if not is_open or time >= self.end + INTERLEAVING:
                    break
            elif packet.stream.index in is_open:
                if target is not None and is_video and packet.is_keyframe and (self.time(packet) or 0.0) <= target:
                    # only where the file was read from its beginning in place of a seek
                    packets = [kept for kept in packets if kept.stream is not self.video]
                packets.append(packet)
        return packets

    def _seek(self, target: float) -> bool:
        """Seek; whether that succeeded. Some formats are read from the beginning instead."""
        if self.format in FORMATS_WITHOUT_SEEK:
            return True
        try:
            self.container.seek(int((target + self.origin) * av.time_base), backward=True)
        except av.FFmpegError:
            return False  # behind the last index entry
        return True

    def covers_start(self, packets: list[Any]) -> bool:
        """Whether the first frame that can be decoded, and the first sound, are at the start or before."""
        first = next(decode_packets(self.video, packets, after_seek=True), None)
        self.video.codec_context.flush_buffers()
        time = None if first is None else self.time(first)
        if time is None or time > self.start + CLOSE:
            return False
        sounds = (self.time(packet) for packet in packets if packet.stream is self.audio)
        return self.audio is None or next((time for time in sounds if time is not None), math.inf) <= self.start


def _packets_to_copy(span: _Span, packets: list[Any]) -> list[Any]:
    """The packets that are the span as they are, from its first key frame on; none where it has to be encoded."""
    codecs = span.video.codec_context.name, span.audio.codec_context.name if span.audio else "aac"
    if codecs[0] not in COPIED_VIDEO or codecs[1] not in COPIED_AUDIO:
        return []
    if any(packet.pts is None or packet.dts is None for packet in packets):
        return []
    shift = min(COPY_SHIFT, 0.5 / float(span.frame_rate))
    video = [packet for packet in packets if packet.stream is span.video]
    times = [presentation_time(packet) - span.origin for packet in video]
    keys = [i for i, packet in enumerate(video) if packet.is_keyframe and abs(times[i] - span.start) <= shift]
    if not keys:
        return []
    # frames before the end may refer to a frame shown after it: then all are encoded again
    if not all(times[keys[0]] <= time < span.end - CLOSE for time in times[keys[0] :]):
        return []
    sound = [packet for packet in packets if packet.stream is span.audio]
    runs = sound_runs(decode_packets(span.audio, sound, after_seek=True), span.path) if sound else []
    if len({run.format for run in runs}) > 1:
        return []  # mp4 has one format for all packets
    taken = {id(packet) for packet in (*video[keys[0] :], *sound)}
    return [packet for packet in packets if id(packet) in taken]


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


def _encoded(span: _Span, packets: list[Any]) -> bytes:
    sound = _Sound(span, packets)
    frames = _stamped(span, packets)
    first = next(frames, None)
    if first is None:
        raise ClipRejectedError("short", f"{span.path}: ends before the cut at {span.start:g} s")
    height, width = (side // 2 * 2 for side in Orientation.of(first.frame).upright_size(first.frame))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as target:
        video: Any = target.add_stream("libx264", rate=span.frame_rate)
        video.width, video.height = width, height
        video.pix_fmt, video.thread_count, video.options = "yuv420p", 1, QUALITY | _same_bytes()
        video.codec_context.time_base = TICK
        _tag_colours(video.codec_context, first.frame)
        audio: Any = None
        if sound.samples.size:
            audio = target.add_stream("aac", rate=sound.rate, layout=sound.layout)
        _encode_frames(target, video, chain([first], frames))
        if audio:
            block = av.AudioFrame.from_ndarray(sound.samples, format="fltp", layout=sound.layout)
            # with a time stamp, the encoder records how many samples it puts in front, and players skip them
            block.sample_rate, block.pts, block.time_base = sound.rate, 0, Fraction(1, sound.rate)
            target.mux(audio.encode(block))
            target.mux(audio.encode(None))
    return buffer.getvalue()


@cache
def _same_bytes() -> dict[str, str]:
    """Options that make x264 give the same bytes each time: its code for AVX-512 gives others now and then."""
    information = Path("/proc/cpuinfo")
    has_avx512 = information.exists() and "avx512f" in information.read_text()
    return {"x264-params": "asm=avx2"} if has_avx512 else {}


def _tag_colours(encoder: Any, frame: Any) -> None:
    """Tag the stream with the colours of the frame, as far as it has tags. Without them, players guess a matrix."""
    if frame.format.is_rgb:
        return
    for name in ("colorspace", "color_primaries", "color_trc"):
        value = int(getattr(frame, name))
        if value != UNSPECIFIED:
            setattr(encoder, name, value)


class _Stamped(NamedTuple):
    """A frame with the times from and until which it is shown, in ticks from the start of the span."""

    frame: Any
    begin: int
    end: int


def _encode_frames(target: Any, video: Any, frames: Iterator[_Stamped]) -> None:
    reformatter = av.video.reformatter.VideoReformatter()
    last, packets = 0, list[Any]()
    for stamped in frames:
        frame = _upright(stamped.frame, video.width, video.height, reformatter)
        frame.pts, frame.time_base, frame.pict_type = stamped.begin, TICK, av.video.frame.PictureType.NONE
        target.mux(packets)
        packets, last = video.encode(frame), stamped.end
    packets += video.encode(None)
    # without its duration, players would show the last frame as long as the one before
    packets[-1].duration = max(last - packets[-1].pts, 1)
    target.mux(packets)


def _upright(frame: Any, width: int, height: int, reformatter: Any) -> Any:
    """The frame as yuv420p, turned upright, with the given size."""
    orientation = Orientation.of(frame)
    size = (height, width) if orientation.is_transposed else (width, height)
    # without a mark, players take the levels for those of television
    levels = {"dst_color_range": "MPEG"} if frame.color_range == FULL_RANGE else {}
    frame = reformatter.reformat(frame, width=size[0], height=size[1], format="yuv420p", threads=1, **levels)
    if orientation == Orientation():
        return frame
    values, luma = frame.to_ndarray().reshape(-1), size[0] * size[1]
    planes = [values[:luma].reshape(size[1], size[0])]
    planes += [plane.reshape(size[1] // 2, size[0] // 2) for plane in np.split(values[luma:], 2)]
    turned = np.concatenate([orientation.upright(plane).reshape(-1) for plane in planes])
    return av.VideoFrame.from_ndarray(turned.reshape(-1, width), format="yuv420p")


def _stamped(span: _Span, packets: list[Any]) -> Iterator[_Stamped]:
    """The frames shown within the span; the first is the one shown at its start, which may begin earlier."""
    pending: tuple[Any, float] | None = None
    last_end = span.start
    for frame in decode_packets(span.video, packets, after_seek=True):
        time = span.time(frame)
        if time is None:
            continue
        last_end = time + float((frame.duration or 0) * frame.time_base or 1 / span.frame_rate)
        if time >= span.end - CLOSE:
            last_end = span.end
            break
        if time <= span.start + CLOSE:
            time = span.start
        if pending is not None and time > pending[1] + float(TICK):
            yield _Stamped(pending[0], *_ticks(span, pending[1], time))
        elif pending is None:
            time = span.start  # where the video begins late, its first frame is shown from the start
        pending = frame, time
    if pending is not None and last_end > span.start + CLOSE:
        yield _Stamped(pending[0], *_ticks(span, pending[1], min(last_end, span.end)))


def _ticks(span: _Span, *times: float) -> tuple[int, ...]:
    return tuple(round((time - span.start) / TICK) for time in times)


class _Sound:
    """The samples of the span, (channels, samples) float32, exact to the sample."""

    def __init__(self, span: _Span, packets: list[Any]) -> None:
        self.samples = np.zeros((1, 0), dtype=np.float32)
        runs = sound_runs(decode_packets(span.audio, packets, after_seek=True), span.path) if span.audio else []
        if not runs:
            return
        self.rate = runs[0].rate if runs[0].rate in AAC_RATES else 48_000
        self.layout = "mono" if runs[0].frames[0].layout.nb_channels == 1 else "stereo"
        begin = span.start + span.origin
        stamps = [time for packet in packets if (time := span.time(packet)) is not None]
        pieces = [(run.start - begin, self._resampled(run)) for run in runs]
        limit = min(span.end, max(stamps)) - span.start
        samples = lay_out(pieces, self.rate, limit=limit, tolerance=0)
        if math.isfinite(span.end):
            samples = samples[:, : round((span.end - span.start) * self.rate)]
        self.samples = np.ascontiguousarray(samples)

    def _resampled(self, run: SoundRun) -> np.ndarray:
        # a resampler is made for one format: it lets later formats pass where the first needed no change
        resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
        frames = (part for frame in (*run.frames, None) for part in resampler.resample(frame))
        return np.concatenate(
            [np.zeros((1 + (self.layout == "stereo"), 0), np.float32), *(f.to_ndarray() for f in frames)], axis=1
        )
