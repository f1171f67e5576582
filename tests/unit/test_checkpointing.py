"""Encoders that recompute activations in backward: the same gradients, with far less memory."""

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


def run(encoder: Encoder, inputs: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Bytes saved between forward and backward, weights aside; every parameter's gradient by name."""
    weights = {weight.untyped_storage().data_ptr() for weight in encoder.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = encoder(inputs).square().sum()
    size = sum(saved.values())
    loss.backward()
    gradients = {}
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        gradients[name] = weight.grad
    return size, gradients


@pytest.mark.parametrize("kind", ["videomae", "audiomae"])
def test_recomputed_activations_are_the_same_and_are_not_saved(kind: str) -> None:
    plain, gradients = run(*encoder_of(kind))
    encoder, inputs = encoder_of(kind)
    encoder.checkpoint_activations()
    checkpointed, again = run(encoder, inputs)
    assert checkpointed < plain / 4
    assert again.keys() == gradients.keys()
    assert gradients
    for name, expected in gradients.items():
        torch.testing.assert_close(again[name], expected, rtol=0, atol=0, msg=name)
