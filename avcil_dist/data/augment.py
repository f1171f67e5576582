"""Random variations of a clip for training: pictures by torchvision, the log-mel filterbank by torchaudio.

Functions of the clip and a seed: the libraries draw from torch's generator of the processor, which is seeded for
the length of a call and then put back to where it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torchaudio.transforms import FrequencyMasking, TimeMasking
from torchvision.transforms import v2

from avcil_dist.config.schema import AugmentConfig
from avcil_dist.seeds import derive_seed


class Augmentation:
    """What `config` says, for pictures of side `size`."""

    def __init__(self, config: AugmentConfig, size: int) -> None:
        crop = [v2.RandomResizedCrop(size, (config.crop, 1.0))] if config.crop < 1 else [v2.Resize(size)]
        colours = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        self._pictures = v2.Compose([*crop, v2.CenterCrop(size), v2.RandomHorizontalFlip(config.flip), colours])
        self._masks = FrequencyMasking(config.mel_mask), TimeMasking(config.time_mask)

    def pictures(self, frames: torch.Tensor, seed: int) -> torch.Tensor:
        """Frames uint8 (T, 3, H, W) to squares uint8 (T, 3, size, size), all of them varied alike."""
        with _drawing_from(derive_seed(seed, "pictures")):
            varied: torch.Tensor = self._pictures(frames)
        return varied

    def sound(self, log_mel: torch.Tensor, seed: int) -> torch.Tensor:
        """Normalised filterbank (mel_frames, mel_bins), with a stretch of time and a band set to 0, the mean."""
        by_bin = log_mel.T
        with _drawing_from(derive_seed(seed, "sound")):
            for mask in self._masks:
                by_bin = mask(by_bin)
        return by_bin.T


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):  # no other device draws here, and `torch.manual_seed` would seed them all
        torch.default_generator.manual_seed(seed)
        yield
