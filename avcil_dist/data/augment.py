"""Random augmentation of training clips: frames by torchvision, the log-mel filterbank by torchaudio.

The result is a function of the clip and a seed. The libraries draw from torch's CPU generator, which is seeded for
the length of a call and then restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from avcil_dist.config.schema import AugmentConfig
from avcil_dist.seeds import derive_seed


class Augmentation:
    """The augmentation of `config` for frames of `size` × `size` pixels."""

    def __init__(self, config: AugmentConfig, size: int) -> None:
        from torchaudio.transforms import FrequencyMasking, TimeMasking
        from torchvision.transforms import v2  # a second of imports, which features do not need

        crop = [v2.RandomResizedCrop(size, (config.crop, 1.0))] if config.crop < 1 else [v2.Resize(size)]
        colour_jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        self._transform = v2.Compose([*crop, v2.CenterCrop(size), v2.RandomHorizontalFlip(config.flip), colour_jitter])
        self._masks = FrequencyMasking(config.mel_mask), TimeMasking(config.time_mask)

    def augment_frames(self, frames: torch.Tensor, seed: int) -> torch.Tensor:
        """Augment frames uint8 (T, 3, H, W), all of them alike. Returns uint8 (T, 3, size, size)."""
        with _seeded(derive_seed(seed, "pictures")):
            augmented: torch.Tensor = self._transform(frames)
        return augmented

    def augment_sound(self, log_mel: torch.Tensor, seed: int) -> torch.Tensor:
        """Set a time span and a frequency band of a normalised filterbank (mel_frames, mel_bins) to 0, the mean."""
        by_bin = log_mel.T
        with _seeded(derive_seed(seed, "sound")):
            for mask in self._masks:
                by_bin = mask(by_bin)
        return by_bin.T


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):  # `torch.manual_seed` would seed the GPUs too
        torch.default_generator.manual_seed(seed)
        yield
