"""Preparation of a decoded clip for the encoders: normalised frames and a log-mel filterbank.

The inputs of a clip are the same in every epoch and on every rank, unless it is augmented (`augment.py`).
"""

import torch
from torch.nn import functional as F
from torchaudio.compliance import kaldi
from torchvision.transforms.v2 import functional as video

from avcil_dist.config.schema import AugmentConfig, ClipConfig
from avcil_dist.data.augment import Augmentation
from avcil_dist.data.decode import DecodedClip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FRAME_SHIFT_MS = 10
WINDOW_MS = 25
NO_AUGMENTATION = AugmentConfig()


class ClipTransform:
    """Visual inputs of VideoMAE and audio inputs of AudioMAE (Huang et al. 2022, section 4)."""

    def __init__(self, config: ClipConfig, augment: AugmentConfig = NO_AUGMENTATION) -> None:
        self.config = config
        self.augmentation = Augmentation(augment, config.size)

    def __call__(self, clip: DecodedClip, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual float32 (T, 3, size, size), audio float32 (mel_frames, mel_bins); augmented if there is a `seed`."""
        if seed is None:
            return self._normalised(self._cropped(clip.frames)), self._filterbank(clip.waveform)
        augmentation = self.augmentation
        return (
            self._normalised(augmentation.augment_frames(clip.frames, seed)),
            augmentation.augment_sound(self._filterbank(clip.waveform), seed),
        )

    def _cropped(self, frames: torch.Tensor) -> torch.Tensor:
        size = self.config.size
        return video.center_crop(video.resize(frames, [size], antialias=True), [size, size])

    def _normalised(self, frames: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return frames.float().div_(255).sub_(mean).div_(std)  # in place: fresh memory costs more than the arithmetic

    def _filterbank(self, waveform: torch.Tensor) -> torch.Tensor:
        config = self.config
        window = -(-config.sample_rate * WINDOW_MS // 1000)
        shift = config.sample_rate * FRAME_SHIFT_MS // 1000
        if waveform.numel():
            # torch splits a sum to one number among threads, so its bits depend on their count; not a sum to two
            waveform = waveform - waveform.expand(2, -1).mean(dim=1)[0]
        waveform = waveform[: window + shift * config.mel_frames]  # the frames behind are cut off below
        waveform = F.pad(waveform, (0, max(0, window - waveform.numel())))
        mel = kaldi.fbank(
            waveform[None],
            htk_compat=True,
            sample_frequency=config.sample_rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=config.mel_bins,
            dither=0.0,
            frame_length=WINDOW_MS,
            frame_shift=FRAME_SHIFT_MS,
        )[: config.mel_frames]
        padded = F.pad(mel, (0, 0, 0, config.mel_frames - len(mel)))
        return (padded - config.mel_mean) / (2 * config.mel_std)
