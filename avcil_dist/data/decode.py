"""Decoder of one clip: from the bytes of a video file to frames and sound, with PyAV.

A container is opened and closed within one call, so that no decoder outlives its clip. `transforms.py` prepares
frames and sound for the encoders.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import av
import numpy as np
import torch
import torchaudio.transforms

from avcil_dist.errors import DataError


class SilentClipError(DataError):
    """A clip without an audio track, or with an empty one."""


# Containers with their own streams. Playlists are not admitted: they make a decoder open other files and urls.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"


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
        video = _video_stream(container, where)
        audio = container.streams.audio
        return ClipInfo(
            duration=_duration(container, video, where),
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
        video = _video_stream(container, where)
        audio = container.streams.audio[0] if container.streams.audio else None
        if audio is None and silent == "error":
            raise SilentClipError(f"{where}: no audio track; leave the clip out, or set clip.silent=silence")
        duration = _duration(container, video, where)
        start = float((video.start_time or 0) * video.time_base)
        selector = _FrameSelector([start + (i + 0.5) * duration / num_frames for i in range(num_frames)])
        sound = _SoundCollector()
        for packet in container.demux(*(stream for stream in (video, audio) if stream is not None)):
            if packet.is_corrupt:
                raise DataError(f"{where}: truncated or corrupt: a packet is cut short")
            for frame in packet.decode():
                if packet.stream is video:
                    selector.add(frame)
                else:
                    sound.add(frame)
        frames = selector.finish()
        if frames is None:
            raise DataError(f"{where}: truncated or corrupt: no frame could be decoded")
        waveform = sound.finish(sample_rate)
    if waveform is None:
        if silent == "error":
            raise SilentClipError(
                f"{where}: no sound in its audio track; leave the clip out, or set clip.silent=silence"
            )
        waveform = torch.zeros(round(duration * sample_rate))
    return DecodedClip(frames=frames, waveform=waveform)


class _FrameSelector:
    """Selects from frames in order of time those shown at given times, and converts them to RGB."""

    def __init__(self, times: list[float]) -> None:
        self._times = times
        self._latest: Any = None
        self._selected: list[torch.Tensor] = []
        self._reformatter = av.video.reformatter.VideoReformatter()

    def add(self, frame: Any) -> None:
        if frame.time is not None:
            self._select_until(frame.time)
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
        while self._latest is not None and len(self._selected) < len(self._times):
            if self._times[len(self._selected)] >= time:
                return
            rgb = self._to_rgb(self._latest) if rgb is None else rgb
            self._selected.append(rgb)

    def _to_rgb(self, frame: Any) -> torch.Tensor:
        # a stream may change its picture size midway; all frames get the size of the first selected one
        height, width = self._selected[0].shape[1:] if self._selected else (frame.height, frame.width)
        picture = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


class _SoundCollector:
    """Collects audio frames of any sample format into one mono waveform."""

    def __init__(self) -> None:
        self._resampler: Any = None
        self._rate = 0
        self._parts: list[np.ndarray] = []

    def add(self, frame: Any) -> None:
        if self._resampler is None:
            self._rate = frame.sample_rate
            # converts the sample format only; the encoders were trained with torchaudio's resampling
            self._resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=frame.sample_rate)
        self._parts += [part.to_ndarray() for part in self._resampler.resample(frame)]

    def finish(self, sample_rate: int) -> torch.Tensor | None:
        """Waveform (samples,) float32, or None without any sample."""
        if self._resampler is not None:
            self._parts += [part.to_ndarray() for part in self._resampler.resample(None)]
        if not sum(part.size for part in self._parts):
            return None
        waveform = torch.from_numpy(np.concatenate(self._parts, axis=1).mean(axis=0))
        return _resampling(self._rate, sample_rate)(waveform)


@lru_cache(maxsize=16)
def _resampling(rate: int, sample_rate: int) -> torchaudio.transforms.Resample:
    """Resampling filter, cached: its construction takes longer than its use."""
    return torchaudio.transforms.Resample(rate, sample_rate)


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


def _video_stream(container: Any, where: str) -> Any:
    if not container.streams.video:
        raise DataError(f"{where}: no video track")
    for stream in (*container.streams.video[:1], *container.streams.audio[:1]):
        if stream.codec_context is None:
            raise DataError(f"{where}: no decoder for its {stream.type} track")
        stream.thread_count = 1  # ranks and workers share the cores
    return container.streams.video[0]


def _duration(container: Any, video: Any, where: str) -> float:
    """Seconds of the video track, or of the container if the track has no duration."""
    if video.duration:
        return float(video.duration * video.time_base)
    if container.duration:
        return float(container.duration / av.time_base)
    raise DataError(f"{where}: the container has no duration")
