"""Noise in the inputs of an evaluation: white Gaussian noise at a stated signal-to-noise ratio, seeded by clip.

The ratio is 10 log10(mean square of the signal / mean square of the noise), in dB. The signal is the waveform or the
normalised frames of a clip, or its features. The noise of a clip depends on seed and key, not on batch or rank.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avcil_dist.seeds import derive_seed


@dataclass(frozen=True)
class InputNoise:
    """Signal-to-noise ratios in dB; None leaves a modality as it is."""

    audio_db: float | None = None
    visual_db: float | None = None
    seed: int = 0

    def on_audio(self, signal: Tensor, key: str) -> Tensor:
        """Return the sound of a clip with noise."""
        return signal if self.audio_db is None else add_noise(signal, self.audio_db, self._seed("audio", key))

    def on_visual(self, signal: Tensor, key: str) -> Tensor:
        """Return the pictures of a clip with noise."""
        return signal if self.visual_db is None else add_noise(signal, self.visual_db, self._seed("visual", key))

    def _seed(self, modality: str, key: str) -> int:
        return derive_seed(self.seed, "noise", modality, key)


def add_noise(signal: Tensor, ratio_db: float, seed: int) -> Tensor:
    """Return the signal plus noise whose expected mean square is `ratio_db` below its own; silence stays silence."""
    values = signal.float()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    # by numpy: the number of torch's threads would change the last bits
    power = float(np.square(values.numpy(), dtype=np.float64).mean()) if values.numel() else 0.0
    return (values + noise * (power / 10 ** (ratio_db / 10)) ** 0.5).to(signal.dtype)
