"""Encoders that compute activations anew in backward: the same numbers, and far less that is kept."""

import pytest
import torch
from torch import Tensor

from avcil_dist.config.encoders import AudioMAEConfig, VideoMAEConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.models.encoders.base import Encoder
from avcil_dist.models.encoders.build import build_audio_encoder, build_visual_encoder

CLIP = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
TINY = {"weights": "random", "dim": 96, "depth": 8, "heads": 2, "train": "full"}


def encoder_of(kind: str) -> tuple[Encoder, Tensor]:
    """An encoder, and inputs for it."""
    torch.manual_seed(0)
    if kind == "videomae":
        visual = VideoMAEConfig.model_validate({"kind": kind, **TINY})
        return build_visual_encoder(visual, CLIP, None), torch.rand(2, CLIP.frames, 3, CLIP.size, CLIP.size)
    audio = AudioMAEConfig.model_validate({"kind": kind, **TINY})
    return build_audio_encoder(audio, CLIP, None), torch.randn(2, CLIP.mel_frames, CLIP.mel_bins)


def run(encoder: Encoder, inputs: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes kept between forward and backward, weights aside; the gradients."""
    weights = {weight.untyped_storage().data_ptr() for weight in encoder.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = encoder(inputs).square().sum()
    size = sum(kept.values())
    loss.backward()
    return size, [weight.grad for weight in encoder.parameters() if weight.grad is not None]


@pytest.mark.parametrize("kind", ["videomae", "audiomae"])
def test_activations_made_anew_are_the_same_and_are_not_kept(kind: str) -> None:
    plain, gradients = run(*encoder_of(kind))
    encoder, inputs = encoder_of(kind)
    encoder.checkpoint_activations()
    checkpointed, again = run(encoder, inputs)
    assert checkpointed < plain / 4
    assert len(again) == len(gradients) > 0
    for found, expected in zip(again, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
