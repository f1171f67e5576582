"""From a decoded clip to the encoders' inputs: a normalised picture sequence and a log-mel filterbank.

No augmentation: what a clip gives is the same in every epoch and on every rank.
"""

import torch
from torch.nn import functional as F
from torchaudio.compliance import kaldi
from torchvision.transforms.v2 import functional as pictures

from avcil_dist.config import ClipConfig
from avcil_dist.data.decode import DecodedClip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FRAME_SHIFT_MS = 10
WINDOW_MS = 25


class ClipTransform:
    """Visual input as VideoMAE takes it, audio input as AudioMAE takes it (Huang et al. 2022, section 4)."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config

    def __call__(self, clip: DecodedClip) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual float32 (T, 3, size, size) and audio float32 (mel_frames, mel_bins)."""
        return self._visual(clip.frames), self._audio(clip.waveform)

    def _visual(self, frames: torch.Tensor) -> torch.Tensor:
        size = self.config.size
        square = pictures.center_crop(pictures.resize(frames, [size], antialias=True), [size, size])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return square.float().div_(255).sub_(mean).div_(std)  # in place: fresh memory costs more than the arithmetic

    def _audio(self, waveform: torch.Tensor) -> torch.Tensor:
        config = self.config
        window = -(-config.sample_rate * WINDOW_MS // 1000)
        shift = config.sample_rate * FRAME_SHIFT_MS // 1000
        if waveform.numel():
            waveform = waveform - waveform.mean()
        waveform = waveform[: window + shift * config.mel_frames]  # what lies behind would be cut off below
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
