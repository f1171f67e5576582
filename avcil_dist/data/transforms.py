"""Transform of a clip: decoded, prepared for the encoders (`inputs.py`), augmented in training (`augment.py`)."""

from functools import partial

import torch

from avcil_dist.config.schema import AugmentConfig, ClipConfig
from avcil_dist.data.augment import Augmentation
from avcil_dist.data.decode import DecodedClip, decode_clip
from avcil_dist.data.inputs import ClipInputs

NO_AUGMENTATION = AugmentConfig()


class ClipTransform:
    """Visual and audio inputs of a clip: those of the encoders, or by default those that the settings describe."""

    def __init__(self, config: ClipConfig | ClipInputs, augment: AugmentConfig = NO_AUGMENTATION) -> None:
        self.prepare = config if isinstance(config, ClipInputs) else ClipInputs.of(config)
        self.augmentation = Augmentation(augment, self.prepare.pictures.size)

    def __call__(self, clip: DecodedClip, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return visual and audio, float32 of `ClipInputs.shapes`; augmented if there is a `seed`."""
        return self.inputs(DecodedClip(self.reduced(clip.frames, seed), clip.waveform), seed)

    def decode(self, data: bytes, *, where: str, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the bytes of a clip and transform it, as `decode_reduced` and `inputs` do."""
        return self.inputs(self.decode_reduced(data, where=where, seed=seed), seed)

    def decode_reduced(self, data: bytes, *, where: str, seed: int | None = None) -> DecodedClip:
        """Decode the bytes of a clip to frames of the final size; one at a time is in memory in its full size.

        Raises DataError, naming `where`, as `decode_clip` does.
        """
        return decode_clip(
            data,
            num_frames=self.prepare.pictures.frames,
            sample_rate=self.prepare.sound.sample_rate,
            silent=self.prepare.silent,
            where=where,
            reduce=partial(self.reduced, seed=seed),
        )

    def reduced(self, frames: torch.Tensor, seed: int | None) -> torch.Tensor:
        """Frames uint8 (…, 3, H, W) as (…, 3, size, size); the same for frames one by one and together."""
        if seed is not None:
            return self.augmentation.augment_frames(frames, seed)
        return self.prepare.pictures.reduced(frames)

    def inputs(self, clip: DecodedClip, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoders' inputs of a clip whose frames are reduced; the sound is augmented if there is a seed."""
        audio = self.prepare.sound.inputs(clip.waveform)
        if seed is not None:
            audio = self.augmentation.augment_sound(audio, seed)
        return self.prepare.pictures.inputs(clip.frames), audio
