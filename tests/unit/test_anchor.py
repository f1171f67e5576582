"""Anchor of a network: fixed scores of its tokens, against numpy."""

import numpy as np
import pytest
import torch

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.models.network_spec import NetworkSpec

BATCH, FRAMES, POSITIONS, DIM, CLASSES = 5, 4, 3, 6, 2
SHAPE = {"frames": FRAMES, "positions": POSITIONS, "dim": DIM}
FEATURES = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}}
TINY = {"weights": "random", "dim": 24, "depth": 3, "heads": 2}
ENCODERS = {
    "visual": {"kind": "videomae", **TINY, "train": "partial", "last_blocks": 1},
    "audio": {"kind": "audiomae", **TINY},
}
CLIP = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)


def network(model: dict[str, object], parts: int = 2, shape: dict[str, int] = SHAPE) -> HeadedNetwork:
    torch.manual_seed(0)
    spec = NetworkSpec(anchor=parts)
    made = build_network(ModelConfig.model_validate(model), CLIP, shape, CLASSES, network_spec=spec)
    assert isinstance(made, HeadedNetwork)
    return made


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("fusion", ["attention", "concat"])
@pytest.mark.parametrize("modality", ["both", "audio", "visual"])
def test_before_training_the_logits_are_the_scores_of_pooled_unit_tokens(modality: str, fusion: str) -> None:
    if (modality, fusion) == ("audio", "concat"):
        pytest.skip("sound has no frames")
    made = network(FEATURES | {"modality": modality, "fusion": fusion})
    visual, audio = random(BATCH, FRAMES, POSITIONS, DIM), random(BATCH, DIM)
    cells = visual.numpy().reshape(BATCH, 2, -1, DIM).mean(axis=2)
    tokens = {"audio": audio.numpy()[:, None], "visual": cells}.get(modality)
    tokens = np.concatenate([audio.numpy()[:, None], cells], axis=1) if tokens is None else tokens
    units = (tokens / np.linalg.norm(tokens, axis=2, keepdims=True)).reshape(BATCH, -1)
    weights = random(units.shape[1] + 1, CLASSES)
    assert made.anchor is not None
    assert not made(visual, audio).logits.any()
    made.anchor.set_weights(weights.double())
    expected = np.concatenate([units, np.ones((BATCH, 1))], axis=1) @ weights.numpy()
    np.testing.assert_allclose(made(visual, audio).logits.detach().numpy(), expected, atol=1e-5)


def test_a_grown_head_keeps_its_rows_and_begins_new_ones_as_zeros() -> None:
    made = network(FEATURES)
    with torch.no_grad():
        made.classifier.weight.fill_(2.0)
    made.grow(CLASSES + 2)
    assert made.classifier.weight[:CLASSES].eq(2).all()
    assert not made.classifier.weight[CLASSES:].any()
    assert not made.classifier.bias.any()


def test_the_anchor_of_trained_encoders_has_frozen_copies_of_them() -> None:
    made = network(ENCODERS, shape={})
    assert made.anchor is not None
    made.train()
    copied = {name for name, _ in made.anchor.named_parameters()}
    assert {name.split(".")[0] for name in copied} == {"visual_encoder"}  # that of sound is frozen itself
    assert not any(parameter.requires_grad for parameter in made.anchor.parameters())
    assert made.anchor.visual_encoder is not None
    assert not any(module.training for module in made.anchor.visual_encoder.modules())
    made.anchor.set_weights(random(3 * 24 + 1, CLASSES).double())
    visual, audio = random(BATCH, 4, 3, 32, 32), random(BATCH, 64, 32)
    before = made(visual, audio).logits.detach()
    features = made.tokens_of_anchor()(visual, audio)
    with torch.no_grad():
        for parameter in made.visual_encoder.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(made(visual, audio).logits.detach(), before)  # the head of zeros hides the network
    changed = made.tokens_of_anchor()(visual, audio)
    torch.testing.assert_close(changed.visual, features.visual)
