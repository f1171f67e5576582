"""Preparation of a decoded clip for its encoders: normalised frames and a log-mel filterbank, as picklable values.

An encoder brings its own preparation (`models/encoders/base.py`); the defaults are those of VideoMAE and AudioMAE.
A subclass may prepare clips in another way. The inputs of a clip are the same in every epoch and on every rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.config.schema import ClipConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FRAME_SHIFT_MS = 10
WINDOW_MS = 25


@dataclass(frozen=True)
class Pictures:
    """Frames for a visual encoder: `frames` of them, evenly over the clip, `size` pixels high and wide, normalised."""

    frames: int = 16
    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def of(cls, clip: ClipConfig) -> "Pictures":
        """Return the preparation that the settings describe."""
        return cls(clip.frames, clip.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the inputs of a clip, float32."""
        return self.frames, 3, self.size, self.size

    def reduced(self, frames: Tensor) -> Tensor:
        """Return frames uint8 (…, 3, H, W) as (…, 3, size, size); the same for frames one by one and together."""
        from torchvision.transforms.v2 import functional as video  # a second of imports, which features do not need

        return video.center_crop(video.resize(frames, [self.size], antialias=True), [self.size, self.size])

    def inputs(self, frames: Tensor) -> Tensor:
        """Return reduced frames uint8 (T, 3, size, size) as inputs of the encoder, float32 of `shape`."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        normalised = torch.empty(frames.shape)
        for frame, target in zip(frames, normalised, strict=True):  # one by one, and in place: in the processor's cache
            target.copy_(frame).div_(255).sub_(mean).div_(std)
        return normalised


@dataclass(frozen=True)
class Sound:
    """Log-mel filterbank for an audio encoder (Huang et al. 2022, section 4), normalised by (x - mean) / (2 · std)."""

    sample_rate: int = 16_000
    mel_bins: int = 128
    mel_frames: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974

    @classmethod
    def of(cls, clip: ClipConfig) -> "Sound":
        """Return the preparation that the settings describe."""
        return cls(clip.sample_rate, clip.mel_bins, clip.mel_frames, clip.mel_mean, clip.mel_std)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input of a clip, float32. Masks of time and bins need two dimensions in this order."""
        return self.mel_frames, self.mel_bins

    def inputs(self, waveform: Tensor) -> Tensor:
        """Return mono sound (samples,) at `sample_rate` as input of the encoder, float32 of `shape`."""
        from torchaudio.compliance import kaldi

        window = -(-self.sample_rate * WINDOW_MS // 1000)
        shift = self.sample_rate * FRAME_SHIFT_MS // 1000
        if waveform.numel():
            # torch splits a sum to one number among threads, so its bits depend on their count; not a sum to two
            waveform = waveform - waveform.expand(2, -1).mean(dim=1)[0]
        waveform = waveform[: window + shift * self.mel_frames]  # the frames behind are cut off below
        waveform = F.pad(waveform, (0, max(0, window - waveform.numel())))
        mel = kaldi.fbank(
            waveform[None],
            htk_compat=True,
            sample_frequency=self.sample_rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self.mel_bins,
            dither=0.0,
            frame_length=WINDOW_MS,
            frame_shift=FRAME_SHIFT_MS,
        )[: self.mel_frames]
        padded = F.pad(mel, (0, 0, 0, self.mel_frames - len(mel)))
        return (padded - self.mean) / (2 * self.std)


@dataclass(frozen=True)
class ClipInputs:
    """Preparation of both modalities of a clip. `silent`: treatment of a clip without sound, as data.clip.silent."""

    pictures: Pictures
    sound: Sound
    silent: Literal["error", "silence"] = "error"

    @classmethod
    def of(cls, clip: ClipConfig) -> "ClipInputs":
        """Return the preparation that the settings describe."""
        return cls(Pictures.of(clip), Sound.of(clip), clip.silent)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the visual and the audio inputs of a clip."""
        return self.pictures.shape, self.sound.shape
