"""Small convolutional encoders: for demonstrations, tests and quick experiments on real clips."""

import math
from collections.abc import Collection
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.config.encoders import SmallConfig
from avcil_dist.data.inputs import Pictures, Sound
from avcil_dist.models.encoders.base import AudioEncoder, VisualEncoder

GRID = 4  # visual tokens are on a grid of 4 by 4 positions


class SmallVisual(VisualEncoder):
    """Strided convolutions on each frame, with one over time between them, so that motion counts."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.early = nn.Sequential(*_convolution(3, 16), *_convolution(16, 32))
        self.over_time = nn.Conv3d(32, 32, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        self.late = nn.Sequential(*_convolution(32, dim))

    @classmethod
    def build(cls, options: SmallConfig, inputs: Pictures, state_keys: Collection[str] | None = None) -> Self:
        """Make the encoder, with fresh weights."""
        return cls(options.dim)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> (B, T, 16, D)."""
        clips, frames = pictures.shape[:2]
        maps = self.early(pictures.flatten(0, 1)).unflatten(0, (clips, frames))
        mixed = maps + self.over_time(maps.transpose(1, 2)).transpose(1, 2)
        tokens = F.adaptive_avg_pool2d(self.late(mixed.flatten(0, 1)), GRID)
        return tokens.flatten(2).transpose(1, 2).unflatten(0, (clips, frames))


class SmallAudio(AudioEncoder):
    """Strided convolutions on the log-mel filterbank.

    A second input channel holds the position on the mel scale: convolutions and the final mean are invariant to
    position, but pitch is a position.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.layers = nn.Sequential(*_convolution(2, 16), *_convolution(16, 32), *_convolution(32, dim))

    @classmethod
    def build(cls, options: SmallConfig, inputs: Sound, state_keys: Collection[str] | None = None) -> Self:
        """Make the encoder, with fresh weights."""
        return cls(options.dim)

    def forward(self, log_mel: Tensor) -> Tensor:
        """(B, mel_frames, mel_bins) -> (B, D)."""
        pitch = torch.linspace(-1, 1, log_mel.shape[2], device=log_mel.device, dtype=log_mel.dtype)
        return self.layers(torch.stack([log_mel, pitch.expand_as(log_mel)], dim=1)).mean(dim=(2, 3))


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    """Convolution of stride 2. GroupNorm, not BatchNorm: a clip's output must not depend on its batch."""
    norm = nn.GroupNorm(math.gcd(8, channels_out), channels_out)
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1), norm, nn.ReLU()
