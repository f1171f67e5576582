"""Random augmentation of training clips: frames by torchvision, the log-mel filterbank by torchaudio.

The result is a function of the clip and a seed. The libraries draw from torch's global CPU generator and take no other.
The thread that prepares batches must not touch it, because the network draws from it meanwhile: a mode of torch, which
holds for the calling thread alone, gives their draws a generator of the call's own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from avcil_dist.config.schema import AugmentConfig
from avcil_dist.seeds import derive_seed

DRAWS = (torch.rand, torch.randint, torch.randperm, torch.Tensor.uniform_)  # of both libraries


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
        with _OwnGenerator(derive_seed(seed, "pictures")):
            augmented: torch.Tensor = self._transform(frames)
        return augmented

    def augment_sound(self, log_mel: torch.Tensor, seed: int) -> torch.Tensor:
        """Set a time span and a frequency band of a normalised filterbank (mel_frames, mel_bins) to 0, the mean."""
        by_bin = log_mel.T
        with _OwnGenerator(derive_seed(seed, "sound")):
            for mask in self._masks:
                by_bin = mask(by_bin)
        return by_bin.T


class _OwnGenerator(TorchFunctionMode):
    """Draw the random numbers of the block from a new generator: those of the global one with the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        own = {"generator": self._generator} if func in DRAWS else {}
        return func(*args, **(kwargs or {}), **own)
