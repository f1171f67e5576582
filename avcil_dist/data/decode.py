"""Decoder of one clip: from the bytes of a video file to frames and sound, with PyAV.

A container is opened and closed within one call, so that no decoder outlives its clip. `transforms.py` prepares
frames and sound for the encoders.
"""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
from av.stream import Disposition

from avcil_dist.data.sound import mono_waveform
from avcil_dist.errors import DataError


class SilentClipError(DataError):
    """A clip without an audio track, or with an empty one."""


# Containers with their own streams. Playlists are not admitted: they make a decoder open other files and urls.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
FORMATS_WITHOUT_TIMES = ("avi",)
DURATION_TOLERANCE = 0.1  # seconds between a declared duration and that of the packets


@dataclass(frozen=True)
class DecodedClip:
    """Frames uint8 (T, 3, H, W), RGB, and mono sound float32 (samples,) in [-1, 1]."""

    frames: torch.Tensor
    waveform: torch.Tensor


@dataclass(frozen=True)
class ClipInfo:
    """Properties of a clip in its container: seconds, Hz, pixels. `sample_rate` is None without an audio track."""

    duration: float
    frames_per_second: float
    width: int
    height: int
    sample_rate: int | None
    container: str


def probe_clip(data: bytes, where: str) -> ClipInfo:
    """Properties that the container declares; nothing is decoded. Raises DataError, naming `where`, for no video."""
    with _opened(data, where) as container:
        video = video_stream(container, where)
        audio = container.streams.audio
        packets = _packets(container, video, audio[0] if audio else None)
        return ClipInfo(
            duration=_duration(container, video, packets, where),
            frames_per_second=float(video.average_rate or 0),
            width=video.width,
            height=video.height,
            sample_rate=audio[0].rate if audio else None,
            container=container.format.name,
        )


def decode_clip(
    data: bytes, *, num_frames: int, sample_rate: int, silent: Literal["error", "silence"], where: str
) -> DecodedClip:
    """Decode frames at evenly spaced times, and mono sound at `sample_rate`.

    The clip is divided into `num_frames` equal spans; the frame shown at the middle of each span is taken. Times
    beyond the last frame give the last frame. A clip without sound gives silence of the clip's length with
    `silent="silence"`. Raises DataError, naming `where`, for an empty, damaged or truncated clip, and
    SilentClipError for a clip without sound with `silent="error"`.
    """
    with _opened(data, where) as container:
        video = video_stream(container, where)
        audio = container.streams.audio[0] if container.streams.audio else None
        if audio is None and silent == "error":
            raise SilentClipError(f"{where}: no audio track; leave the clip out, or set clip.silent=silence")
        packets = _packets(container, video, audio)
        duration = _duration(container, video, packets, where)
        if any(packet.is_corrupt for packet in packets):
            raise DataError(f"{where}: truncated or corrupt: a packet is cut short")
        selector = _FrameSelector(num_frames, duration)
        for frame in decode_packets(video, packets):
            selector.add(frame)
        frames = selector.finish()
        if frames is None:
            raise DataError(f"{where}: truncated or corrupt: no frame could be decoded")
        begin = selector.begin or 0.0
        sound = decode_packets(audio, packets) if audio else ()
        waveform = mono_waveform(sound, begin=begin, duration=duration, sample_rate=sample_rate)
    if waveform is not None and not waveform.isfinite().all():
        raise DataError(f"{where}: its sound has values that are no number")
    if waveform is None:
        if silent == "error":
            raise SilentClipError(
                f"{where}: no sound in its audio track; leave the clip out, or set clip.silent=silence"
            )
        waveform = torch.zeros(round(duration * sample_rate))
    return DecodedClip(frames=frames, waveform=waveform)


class _FrameSelector:
    """Selects from frames in order of time those shown at the middles of equal spans, as upright RGB.

    The first frame begins the first span. A frame is shown until the next one begins, the last one for ever.
    """

    def __init__(self, num_frames: int, duration: float) -> None:
        self._num_frames, self._duration = num_frames, duration
        self.begin: float | None = None
        self._times: list[float] = []
        self._latest: Any = None
        self._selected: list[torch.Tensor] = []
        self._reformatter = av.video.reformatter.VideoReformatter()

    def add(self, frame: Any) -> None:
        time = presentation_time(frame)
        if self.begin is None:
            self.begin = 0.0 if time is None else time
            spans = range(self._num_frames)
            self._times = [self.begin + (i + 0.5) * self._duration / self._num_frames for i in spans]
        elif time is not None:
            self._select_until(time)
        self._latest = frame

    def finish(self) -> torch.Tensor | None:
        """Selected frames (T, 3, H, W), or None without any frame."""
        if self._latest is None:
            return None
        self._select_until(math.inf)
        return torch.stack(self._selected)

    def _select_until(self, time: float) -> None:
        """Select the latest frame, which is shown until `time`, for every given time before it."""
        rgb = None
        while len(self._selected) < len(self._times):
            if self._times[len(self._selected)] >= time:
                return
            rgb = self._to_rgb(self._latest) if rgb is None else rgb
            self._selected.append(rgb)

    def _to_rgb(self, frame: Any) -> torch.Tensor:
        # a stream may change its picture size midway; all frames get the size of the first selected one
        orientation = Orientation.of(frame)
        height, width = self._selected[0].shape[1:] if self._selected else orientation.upright_size(frame)
        if orientation.is_transposed:
            height, width = width, height
        picture = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
        return torch.from_numpy(orientation.upright(picture)).permute(2, 0, 1).contiguous()


class Orientation(NamedTuple):
    """Turn that makes a frame upright: transposed, then mirrored vertically and horizontally."""

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> "Orientation":
        """The orientation of a frame by its display matrix, which maps (x, y) to (ax + cy, bx + dy)."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, b < 0, c < 0)
        return cls(False, d < 0, a < 0)

    def upright_size(self, frame: Any) -> tuple[int, int]:
        """Height and width of the upright frame."""
        return (frame.width, frame.height) if self.is_transposed else (frame.height, frame.width)

    def upright(self, picture: np.ndarray) -> np.ndarray:
        """Turn a picture (H, W, …) upright."""
        if self.is_transposed:
            picture = picture.swapaxes(0, 1)
        if self.flips_rows:
            picture = picture[::-1]
        if self.flips_columns:
            picture = picture[:, ::-1]
        return np.ascontiguousarray(picture)


def presentation_time(stamped: Any) -> float | None:
    """Presentation time of a packet or frame in seconds; its decoding time if it has no other, as in some AVI files."""
    stamp = stamped.dts if stamped.pts is None else stamped.pts
    return None if stamp is None or stamped.time_base is None else float(stamp * stamped.time_base)


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Any]:
    """Open a container and close it in any case; errors of the decoder become DataError."""
    if not data:
        raise DataError(f"{where}: empty (0 bytes)")
    container = None
    try:
        container = av.open(io.BytesIO(data), options={"format_whitelist": CONTAINERS}, metadata_errors="ignore")
        yield container
    except (av.FFmpegError, ValueError, EOFError) as error:
        fault = "not a video, or cut before its index" if container is None else "truncated or corrupt"
        raise DataError(f"{where}: {fault} ({getattr(error, 'strerror', None) or error})") from None
    finally:
        if container is not None:
            container.close()


def video_stream(container: Any, where: str) -> Any:
    """The first video track; a cover picture is none. Raises DataError, naming `where`, without one.

    The decoders of this track and of the first audio track are set to one thread: ranks and workers share the cores.
    """
    tracks = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not tracks:
        raise DataError(f"{where}: no video track")
    for stream in (tracks[0], *container.streams.audio[:1]):
        if stream.codec_context is None:
            raise DataError(f"{where}: no decoder for its {stream.type} track")
        stream.thread_count = 1
    return tracks[0]


def decode_packets(stream: Any, packets: Iterable[Any], *, after_seek: bool = False) -> Iterator[Any]:
    """All frames of the packets of one stream, with their time stamps; the decoder can be used again.

    The packets after a seek may refer to others before them: errors of such count only if no frame follows at all.
    """
    own = [packet for packet in packets if packet.stream is stream and packet.size]
    frames = _decoded(stream, own, after_seek)
    if stream.type != "video" or stream.container.format.name not in FORMATS_WITHOUT_TIMES:
        yield from frames
        return
    # the presentation times of such a format are guesses; its packets have the times of the frames, in another order
    stamps = sorted(packet.dts for packet in own if packet.dts is not None)
    if after_seek:  # frames that cannot be decoded are the first
        stamps = stamps[-sum(1 for _ in _decoded(stream, own, after_seek)) :]
    for number, frame in enumerate(frames):
        frame.pts = stamps[number] if number < len(stamps) else stamps[-1] + number - len(stamps) + 1
        yield frame


def _decoded(stream: Any, packets: Iterable[Any], after_seek: bool) -> Iterator[Any]:
    count, fault = 0, None
    for packet in packets:
        try:
            frames = packet.decode()
        except av.InvalidDataError as error:
            if count or not after_seek:
                raise
            frames, fault = [], error
        count += len(frames)
        yield from frames
    for frame in stream.codec_context.decode(None):
        frame.time_base = stream.time_base  # otherwise it would be that of the packet, and here is none
        count += 1
        yield frame
    stream.codec_context.flush_buffers()
    if fault and not count:
        raise fault


def _packets(container: Any, video: Any, audio: Any) -> list[Any]:
    """All packets of the two tracks."""
    return list(container.demux(*(stream for stream in (video, audio) if stream is not None)))


def _duration(container: Any, video: Any, packets: list[Any], where: str) -> float:
    """Seconds of the clip: as declared by the video track, or else by the container, if its packets agree.

    A declared duration is a hint. One that ends before the frames do, or after frames and sound, is replaced by
    the end of these.
    """
    spans: dict[str, tuple[float, float]] = {}
    for packet in packets:
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None and packet.size and not packet.is_discard:
            begin, end = (float(time * packet.time_base) for time in (stamp, stamp + (packet.duration or 0)))
            known = spans.get(packet.stream.type, (begin, end))
            spans[packet.stream.type] = min(begin, known[0]), max(end, known[1])
    if "video" not in spans:
        raise DataError(f"{where}: truncated or corrupt: no frame in its video track")
    begin, end = spans["video"]
    shortest, longest = end - begin, max(end, spans.get("audio", (end, end))[1]) - begin
    declared = None
    if video.duration:
        declared = float(video.duration * video.time_base)
    elif container.duration:
        declared = float(container.duration / av.time_base)
    if declared is None or declared < shortest - DURATION_TOLERANCE:
        return shortest
    return longest if declared > longest + DURATION_TOLERANCE else declared
