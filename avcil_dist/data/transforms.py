"""Transform of a clip: decoded, prepared for the encoders (`inputs.py`), augmented in training (`augment.py`)."""

from dataclasses import replace
from functools import partial

import torch

from avcil_dist.config.schema import AugmentConfig, ClipConfig
from avcil_dist.data.augment import Augmentation
from avcil_dist.data.decode import DecodedClip, decode_clip
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.noise import InputNoise

NO_AUGMENTATION = AugmentConfig()


class ClipTransform:
    """Visual and audio inputs of a clip: those of the encoders, or by default those that the settings describe.

    `noise` is added to the decoded waveform and to the normalised frames.
    """

    def __init__(
        self,
        config: ClipConfig | ClipInputs,
        augment: AugmentConfig = NO_AUGMENTATION,
        noise: InputNoise | None = None,
    ) -> None:
        self.prepare = config if isinstance(config, ClipInputs) else ClipInputs.of(config)
        self.augmentation = Augmentation(augment, self.prepare.pictures.size)
        self.noise = noise

    def __call__(self, clip: DecodedClip, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return visual and audio, float32 of `ClipInputs.shapes`; augmented if there is a `seed`."""
        return self.inputs(DecodedClip(self.reduced(clip.frames, seed), clip.waveform), seed)

    def decode(self, data: bytes, *, where: str, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the bytes of a clip and transform it, as `decode_reduced` and `inputs` do; `where` seeds the noise."""
        clip = self.decode_reduced(data, where=where, seed=seed)
        if self.noise is None:
            return self.inputs(clip, seed)
        visual, audio = self.inputs(replace(clip, waveform=self.noise.on_audio(clip.waveform, where)), seed)
        return self.noise.on_visual(visual, where), audio

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
