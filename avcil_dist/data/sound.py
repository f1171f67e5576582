"""Sound of a clip on a clock: every frame at its own time stamp, with silence in gaps.

The sampling rate, the channels and the sample format may change from frame to frame. Frames of one format that
follow each other form a run; runs are placed on the clock by their start times.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import av
import numpy as np
import torch
import torchaudio.transforms

from avcil_dist.data.clip_bounds import MAX_SAMPLES, check_sound

# Seconds that sound may be off its time stamp: stamps are rounded, and encoders add up to a frame of their own.
# Nobody perceives so small an offset.
TOLERANCE = 0.03
# Sample formats with the factor to [-1, 1] and the value of silence. All factors are powers of two: exact in float32.
FORMATS = {
    "u8": (2.0**-7, 128),
    "s16": (2.0**-15, 0),
    "s32": (2.0**-31, 0),
    "flt": (1.0, 0),
    "dbl": (1.0, 0),
}
# PyAV reads beyond the planes of a planar frame of eight or more channels
MAX_PLANES = 7
# Numbers in a resampling filter of torchaudio: rate × rate / gcd². Unusual rates would need gigabytes.
MAX_FILTER = 4_000_000


@dataclass
class SoundRun:
    """Audio frames of one format without gaps, as they are or converted; `start` and `end` in seconds."""

    start: float
    rate: int
    format: tuple[str, str, int]
    frames: list[Any] = field(default_factory=list)
    samples: int = 0

    @property
    def end(self) -> float:
        """The time behind the last sample."""
        return self.start + self.samples / self.rate


def sound_runs(
    frames: Iterable[Any], where: str, convert: Callable[[Any], Any] = lambda frame: frame
) -> list[SoundRun]:
    """Divide audio frames into runs, which keep what `convert` returns of each frame.

    Raises ValueError for a frame without a sampling rate, and DataError, naming `where`, for sound beyond a bound.
    """
    runs: list[SoundRun] = []
    samples = 0
    for frame in frames:
        rate, count = frame.sample_rate, frame.samples
        if rate <= 0:
            raise ValueError("its sound has no sampling rate")
        if not count:
            continue
        samples += count
        format_ = frame.format.name, frame.layout.name, rate
        expected = runs[-1].end if runs else 0.0
        time = frame.time
        start = expected if time is None else time
        if not runs or runs[-1].format != format_ or abs(start - expected) > TOLERANCE:
            check_sound(rate, frame.layout.nb_channels, samples, where)
            runs.append(SoundRun(start, rate, format_))
        runs[-1].frames.append(convert(frame))
        runs[-1].samples += count
        if samples > MAX_SAMPLES:
            check_sound(rate, 0, samples, where)
    return runs


def lay_out(
    pieces: Sequence[tuple[float, np.ndarray]], rate: int, *, limit: float, tolerance: float = TOLERANCE
) -> np.ndarray:
    """Place pieces, each a start in seconds and its samples (…, samples), on a clock that begins at 0.

    Gaps are silence. Samples before 0, or before the end of the piece in front, are dropped, and so is a piece that
    begins after a gap and after `limit` seconds. Gaps and overlaps of at most `tolerance` seconds are closed.
    """
    parts, length = [pieces[0][1][..., :0]], 0
    for start, samples in pieces:
        gap = round(start * rate) - length
        if abs(gap) <= tolerance * rate:
            gap = 0
        if gap > 0:
            if start > limit:
                continue
            parts.append(np.zeros((*samples.shape[:-1], gap), samples.dtype))
        parts.append(samples[..., max(-gap, 0) :])
        length += max(gap, 0) + parts[-1].shape[-1]
    return np.concatenate(parts, axis=-1)


def mono_waveform(
    frames: Iterable[Any], *, begin: float, duration: float, sample_rate: int, where: str
) -> torch.Tensor | None:
    """Mono sound (samples,) float32 at `sample_rate`, from time `begin` on; None without a sample.

    Sound that continues after `duration` seconds is part of it. Raises ValueError for sound that cannot be read, and
    DataError, naming `where`, for sound beyond a bound.
    """
    runs = sound_runs(frames, where, _mono)
    if not runs:
        return None
    pieces = [(run.start - begin, np.concatenate(run.frames)) for run in runs]
    rate = runs[0].rate
    if all(run.rate == rate for run in runs):
        waveform = resample(torch.from_numpy(lay_out(pieces, rate, limit=duration)), rate, sample_rate)
    else:
        resampled = [
            (start, resample(torch.from_numpy(samples), run.rate, sample_rate).numpy())
            for run, (start, samples) in zip(runs, pieces, strict=True)
        ]
        waveform = torch.from_numpy(lay_out(resampled, sample_rate, limit=duration))
    return waveform if waveform.numel() else None


def resample(waveform: torch.Tensor, rate: int, sample_rate: int) -> torch.Tensor:
    """Change the sampling rate of a waveform (samples,) float32.

    Usual rates are resampled by torchaudio, as the encoders' training data were; rates whose filter would be too
    large by libswresample.
    """
    divisor = math.gcd(rate, sample_rate)
    if (rate // divisor) * (sample_rate // divisor) <= MAX_FILTER:
        return _resampling(rate, sample_rate)(waveform)
    if not waveform.numel():
        return waveform
    frame = av.AudioFrame.from_ndarray(waveform.numpy()[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
    parts = [part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))]
    return torch.from_numpy(np.concatenate(parts))


@lru_cache(maxsize=16)
def _resampling(rate: int, sample_rate: int) -> torchaudio.transforms.Resample:
    """Resampling filter, cached: its construction takes longer than its use."""
    return torchaudio.transforms.Resample(rate, sample_rate)


def _mono(frame: Any) -> np.ndarray:
    """The mean of the channels of a frame (samples,), float32."""
    channels = frame.layout.nb_channels
    if frame.format.name != "fltp" or channels > MAX_PLANES:
        return np.asarray(_channels(frame).mean(axis=0))
    total = np.zeros(frame.samples, np.float32)  # the usual format, without detours
    for plane in frame.planes[:channels]:
        total += np.frombuffer(plane, dtype=np.float32, count=frame.samples)
    return total / np.float32(channels)


def _channels(frame: Any) -> np.ndarray:
    """The samples of a frame (channels, samples), float32 in [-1, 1]."""
    name = frame.format.name.removesuffix("p")
    if name not in FORMATS or (frame.format.is_planar and frame.layout.nb_channels > MAX_PLANES):
        resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
        parts = [*resampler.resample(frame), *resampler.resample(None)]
        packed = np.concatenate([part.to_ndarray() for part in parts], axis=1)
        return np.ascontiguousarray(packed.reshape(-1, frame.layout.nb_channels).T)
    values = frame.to_ndarray()
    if frame.format.is_packed:
        values = values.reshape(-1, frame.layout.nb_channels).T
    factor, silence = FORMATS[name]
    if values.dtype.kind == "f":
        return np.ascontiguousarray(values, dtype=np.float32)
    return (values.astype(np.int64) - silence).astype(np.float32) * np.float32(factor)
