"""Preparation of a decoded clip for the encoders: normalised frames and a log-mel filterbank.

The inputs of a clip are the same in every epoch and on every rank, unless it is augmented (`augment.py`).
"""

from functools import partial

import torch
from torch.nn import functional as F
from torchaudio.compliance import kaldi
from torchvision.transforms.v2 import functional as video

from avcil_dist.config.schema import AugmentConfig, ClipConfig
from avcil_dist.data.augment import Augmentation
from avcil_dist.data.decode import DecodedClip, decode_clip

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
            num_frames=self.config.frames,
            sample_rate=self.config.sample_rate,
            silent=self.config.silent,
            where=where,
            reduce=partial(self.reduced, seed=seed),
        )

    def reduced(self, frames: torch.Tensor, seed: int | None) -> torch.Tensor:
        """Frames uint8 (…, 3, H, W) as (…, 3, size, size); the same for frames one by one and together."""
        if seed is not None:
            return self.augmentation.augment_frames(frames, seed)
        size = self.config.size
        return video.center_crop(video.resize(frames, [size], antialias=True), [size, size])

    def inputs(self, clip: DecodedClip, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoders' inputs of a clip whose frames are reduced; the sound is augmented if there is a seed."""
        audio = self._filterbank(clip.waveform)
        if seed is not None:
            audio = self.augmentation.augment_sound(audio, seed)
        return self._normalised(clip.frames), audio

    def _normalised(self, frames: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        normalised = torch.empty(frames.shape)
        for frame, target in zip(frames, normalised, strict=True):  # one by one, and in place: in the processor's cache
            target.copy_(frame).div_(255).sub_(mean).div_(std)
        return normalised

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
