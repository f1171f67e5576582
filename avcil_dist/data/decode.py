"""Decoder of one clip: from the bytes of a video file to frames and sound, with PyAV.

A container is opened and closed within one call, so that no decoder outlives its clip. `clip_bounds.py` limits what
a clip may cost; `transforms.py` prepares frames and sound for the encoders.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import av
import torch
from av.stream import Disposition

from avcil_dist.data.clip_bounds import MAX_PACKETS, MAX_PIXELS, check_length, check_picture, check_sound
from avcil_dist.data.container_claims import check_claims
from avcil_dist.data.frames import FrameSelector, Reduction, shown_stamps
from avcil_dist.data.sound import mono_waveform
from avcil_dist.errors import DataError


class SilentClipError(DataError):
    """A clip without an audio track, or with an empty one."""


# Containers with their own streams. Playlists are not admitted: they make a decoder open other files and urls.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
FORMATS_WITHOUT_TIMES = ("avi",)
DURATION_TOLERANCE = 0.1  # seconds between a declared duration and that of the packets
# Codecs of which the frames that no other frame refers to can be left out without a change to the others
SKIPPED_CODECS = ("h264",)


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
        packets = _packets(container, video, audio[0] if audio else None, where)
        return ClipInfo(
            duration=_duration(container, video, packets, where),
            frames_per_second=float(video.average_rate or 0),
            width=video.width,
            height=video.height,
            sample_rate=audio[0].rate if audio else None,
            container=container.format.name,
        )


def decode_clip(
    data: bytes,
    *,
    num_frames: int,
    sample_rate: int,
    silent: Literal["error", "silence"],
    where: str,
    reduce: Reduction | None = None,
    is_thorough: bool = False,
) -> DecodedClip:
    """Decode frames at evenly spaced times, and mono sound at `sample_rate`.

    The clip is divided into `num_frames` equal spans; the frame shown at the middle of each span is taken, and what
    `reduce` returns of it is kept. Times beyond the last frame give the last frame. Frames that no selected one
    refers to may be left out, unless `is_thorough`. A clip without sound gives silence of the clip's length with
    `silent="silence"`. Raises DataError, naming `where`, for an empty, damaged or truncated clip, or one beyond a
    bound (`clip_bounds.py`), and SilentClipError for a clip without sound with `silent="error"`.
    """
    with _opened(data, where) as container:
        video = video_stream(container, where)
        audio = container.streams.audio[0] if container.streams.audio else None
        if audio is None and silent == "error":
            raise SilentClipError(f"{where}: no audio track; leave the clip out, or set clip.silent=silence")
        packets = _packets(container, video, audio, where)
        duration = _duration(container, video, packets, where)
        if any(packet.is_corrupt for packet in packets):
            raise DataError(f"{where}: truncated or corrupt: a packet is cut short")
        selection = _select_frames(video, packets, num_frames, duration, reduce, is_thorough)
        if selection is None:
            raise DataError(f"{where}: truncated or corrupt: no frame could be decoded")
        frames, begin = selection
        sound = decode_packets(audio, packets) if audio else ()
        waveform = mono_waveform(sound, begin=begin, duration=duration, sample_rate=sample_rate, where=where)
    if waveform is not None and not waveform.isfinite().all():
        raise DataError(f"{where}: its sound has values that are no number")
    if waveform is None:
        if silent == "error":
            raise SilentClipError(
                f"{where}: no sound in its audio track; leave the clip out, or set clip.silent=silence"
            )
        waveform = torch.zeros(round(duration * sample_rate))
    return DecodedClip(frames=frames, waveform=waveform)


def _select_frames(
    video: Any, packets: list[Any], num_frames: int, duration: float, reduce: Reduction | None, is_thorough: bool
) -> tuple[torch.Tensor, float] | None:
    """Selected frames (T, 3, H, W) and the time of the first frame; None without any frame."""
    needed = None if is_thorough else _needed_stamps(video, packets, num_frames, duration)
    if needed:
        selector = FrameSelector(num_frames, duration, reduce)
        with contextlib.suppress(av.FFmpegError):  # all frames are decoded then, which raises it again
            for frame in decode_packets(video, packets, needed=frozenset(needed)):
                if frame.interlaced_frame:  # its second field may be in a packet of its own
                    break
                selector.add(frame)
            else:
                frames = selector.finish()
                if frames is not None and selector.stamps == needed:
                    return frames, selector.begin or 0.0
        video.codec_context.flush_buffers()
        video.codec_context.skip_frame = "DEFAULT"
    selector = FrameSelector(num_frames, duration, reduce)
    for frame in decode_packets(video, packets):
        selector.add(frame)
    frames = selector.finish()
    return None if frames is None else (frames, selector.begin or 0.0)


def _needed_stamps(video: Any, packets: list[Any], num_frames: int, duration: float) -> list[int] | None:
    """The presentation stamps of the frames to select, by the packets; None where these do not determine them."""
    own = [packet for packet in packets if packet.stream is video and packet.size]
    if video.codec_context.name not in SKIPPED_CODECS or video.container.format.name in FORMATS_WITHOUT_TIMES:
        return None
    if any(packet.pts is None for packet in own):
        return None
    stamps = [packet.pts for packet in own if not packet.is_discard]
    return shown_stamps(stamps, video.time_base, num_frames, duration) if stamps else None


@contextlib.contextmanager
def _opened(data: bytes, where: str) -> Iterator[Any]:
    """Open a container and close it in any case; errors of the decoder become DataError."""
    if not data:
        raise DataError(f"{where}: empty (0 bytes)")
    file, container = io.BytesIO(data), None
    check_claims(file, where)
    try:
        container = av.open(file, options={"format_whitelist": CONTAINERS}, metadata_errors="ignore")
        yield container
    except (av.FFmpegError, ValueError, EOFError, MemoryError) as error:
        fault = "not a video, or cut before its index" if container is None else "truncated or corrupt"
        raise DataError(f"{where}: {fault} ({getattr(error, 'strerror', None) or error})") from None
    finally:
        if container is not None:
            container.close()


def video_stream(container: Any, where: str) -> Any:
    """The first video track; a cover picture is none. Raises DataError, naming `where`, without one.

    The decoders of this track and of the first audio track are set to one thread: ranks and workers share the cores.
    Raises DataError for tracks beyond a bound.
    """
    tracks = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not tracks:
        raise DataError(f"{where}: no video track")
    for stream in (tracks[0], *container.streams.audio[:1]):
        if stream.codec_context is None:
            raise DataError(f"{where}: no decoder for its {stream.type} track")
        stream.thread_count = 1
    check_picture(tracks[0].width, tracks[0].height, where)
    tracks[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change on the way
    for stream in container.streams.audio[:1]:
        check_sound(stream.rate or 0, stream.codec_context.layout.nb_channels, 0, where)
    return tracks[0]


def decode_packets(
    stream: Any, packets: Iterable[Any], *, after_seek: bool = False, needed: frozenset[int] | None = None
) -> Iterator[Any]:
    """All frames of the packets of one stream, with their time stamps; the decoder can be used again.

    The packets after a seek may refer to others before them: errors of such count only if no frame follows at all.
    Frames that no other frame refers to are left out if their stamps are not in `needed`.
    """
    own = [packet for packet in packets if packet.stream is stream and packet.size]
    frames = _decoded(stream, own, after_seek, needed)
    if stream.type != "video" or stream.container.format.name not in FORMATS_WITHOUT_TIMES:
        yield from frames
        return
    # the presentation times of such a format are guesses; its packets have the times of the frames, in another order
    stamps = sorted(packet.dts for packet in own if packet.dts is not None)
    if after_seek:  # frames that cannot be decoded are the first
        stamps = stamps[-sum(1 for _ in _decoded(stream, own, after_seek, None)) :]
    for number, frame in enumerate(frames):
        frame.pts = stamps[number] if number < len(stamps) else stamps[-1] + number - len(stamps) + 1
        yield frame


def _decoded(stream: Any, packets: Iterable[Any], after_seek: bool, needed: frozenset[int] | None) -> Iterator[Any]:
    count, fault = 0, None
    for packet in packets:
        if needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
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
    if needed is not None:
        stream.codec_context.skip_frame = "DEFAULT"
    if fault and not count:
        raise fault


def _packets(container: Any, video: Any, audio: Any, where: str) -> list[Any]:
    """All packets of the two tracks. Raises DataError for more than `MAX_PACKETS`."""
    packets = []
    for packet in container.demux(*(stream for stream in (video, audio) if stream is not None)):
        packets.append(packet)
        if len(packets) > MAX_PACKETS:
            raise DataError(f"{where}: more than {MAX_PACKETS:,} packets; cut it")
    return packets


def _duration(container: Any, video: Any, packets: list[Any], where: str) -> float:
    """Seconds of the clip: as declared by the video track, or else by the container, if its packets agree.

    A declared duration is a hint. One that ends before the frames do, or after frames and sound, is replaced by
    the end of these. Raises DataError for a clip that is too long, or too much work.
    """
    pictures = [packet for packet in packets if packet.stream is video]
    span = _span(pictures, video)
    if span is None:
        raise DataError(f"{where}: truncated or corrupt: no frame in its video track")
    others = [packet for packet in packets if packet.stream is not video]
    begin, end = span
    sound = _span(others, others[0].stream) if others else None
    shortest, longest = end - begin, max(end, sound[1] if sound else end) - begin
    check_length(longest, len(pictures), video.width * video.height, where)
    declared = None
    if video.duration:
        declared = float(video.duration * video.time_base)
    elif container.duration:
        declared = float(container.duration / av.time_base)
    if declared is None or declared < shortest - DURATION_TOLERANCE:
        return shortest
    return longest if declared > longest + DURATION_TOLERANCE else declared


def _span(packets: Sequence[Any], stream: Any) -> tuple[float, float] | None:
    """The times of the first begin and the last end of a stream's packets, in seconds; None without any."""
    stamped = [
        (packet.dts if packet.pts is None else packet.pts, packet.duration or 0)
        for packet in packets
        if packet.size and not packet.is_discard
    ]
    begins = [stamp for stamp, _ in stamped if stamp is not None]
    if not begins:
        return None
    end, base = max(stamp + duration for stamp, duration in stamped if stamp is not None), stream.time_base
    return min(begins) * base.numerator / base.denominator, end * base.numerator / base.denominator
