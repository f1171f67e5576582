"""Fusion of frames: each with a projection of its own, against attention written out in plain torch."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from avcil_dist.models.network import AudioVisualNetwork, Network, VisualNetwork, build_network
from avcil_dist.training.preflight import preflight
from tests.helpers.streams import write_config

BATCH, FRAMES, POSITIONS, DIM, CLASSES = 5, 3, 4, 6, 2
SHAPE = {"frames": FRAMES, "positions": POSITIONS, "dim": DIM}
FEATURES = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}}


def network(**changes: str) -> Network:
    torch.manual_seed(0)
    model = ModelConfig.model_validate(FEATURES | {"fusion": "concat"} | changes)
    return build_network(model, ClipConfig(), SHAPE, CLASSES)


def inputs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH, FRAMES, POSITIONS, DIM, generator=random),
        torch.randn(BATCH, DIM, generator=random),
    )


def spatial_attention(made: AudioVisualNetwork, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """softmax over positions of tanh(Wv + b) · tanh(W'a + b'), per channel: (B, T, S, D)."""
    attention = made.attention
    keys = torch.tanh(F.linear(visual, attention.attn_visual.weight, attention.attn_visual.bias))
    guide = torch.tanh(attention.attn_audio(audio))
    return torch.softmax(keys * guide[:, None, None], dim=2)


def test_each_frame_is_pooled_and_projected_by_its_own_weights() -> None:
    made, (visual, audio) = network(), inputs()
    assert isinstance(made, AudioVisualNetwork)
    pooled = (spatial_attention(made, visual, audio) * visual).sum(dim=2)
    weight = made.visual_proj.weight.view(DIM, FRAMES, DIM)
    projected = torch.einsum("btd,otd->bo", pooled, weight) + made.visual_proj.bias
    expected = torch.relu(projected) + torch.relu(made.audio_proj(audio))
    output = made(visual, audio)
    torch.testing.assert_close(output.pooled, pooled.flatten(1))
    torch.testing.assert_close(output.logits, made.classifier(expected))


def test_the_order_of_the_frames_counts_only_if_they_are_side_by_side() -> None:
    visual, audio = inputs()
    backwards = visual.flip(1)
    for fusion, counts in (("concat", True), ("sum", False)):
        made = network(fusion=fusion)
        same = torch.allclose(made(visual, audio).logits, made(backwards, audio).logits, atol=1e-5)
        assert same is not counts


def test_the_divergence_from_a_teacher_is_that_of_the_spatial_attention_of_all_frames() -> None:
    student, (visual, audio) = network(), inputs()
    torch.manual_seed(7)
    teacher = build_network(ModelConfig.model_validate(FEATURES | {"fusion": "concat"}), ClipConfig(), SHAPE, CLASSES)
    assert isinstance(student, AudioVisualNetwork)
    assert isinstance(teacher, AudioVisualNetwork)
    exemplars = slice(2, None)
    output = student(visual, audio, teacher.attention_view(visual, audio, exemplars))
    ours, theirs = (spatial_attention(made, visual, audio)[exemplars] for made in (student, teacher))
    expected = (theirs * (theirs.log() - ours.log())).sum(dim=(1, 2, 3))
    assert output.divergence is not None
    torch.testing.assert_close(output.divergence.spatial, expected)
    torch.testing.assert_close(output.divergence.temporal, torch.zeros(BATCH - 2))
    output.divergence.spatial.sum().backward()
    assert student.attention.attn_visual.weight.grad is not None
    assert teacher.attention.attn_visual.weight.grad is None


def test_pictures_alone_are_the_mean_of_each_frame_side_by_side() -> None:
    made, (visual, audio) = network(modality="visual"), inputs()
    assert isinstance(made, VisualNetwork)
    expected = torch.relu(made.visual_proj(visual.mean(dim=2).flatten(1)))
    torch.testing.assert_close(made(visual, audio).logits, made.classifier(expected))


def test_clips_have_as_many_projections_as_the_encoder_has_frames() -> None:
    small = {"visual": {"kind": "small", "dim": 8}, "audio": {"kind": "small", "dim": 8}, "fusion": "concat"}
    clip = ClipConfig(frames=4, size=16, mel_bins=16, mel_frames=16)
    made = build_network(ModelConfig.model_validate(small), clip, {}, CLASSES)
    assert made(torch.zeros(2, 4, 3, 16, 16), torch.zeros(2, 16, 16)).logits.shape == (2, CLASSES)
    tubelets = {
        "visual": {"kind": "videomae", "weights": "random", "dim": 8, "depth": 1, "heads": 2},
        "audio": {"kind": "small", "dim": 8},
        "fusion": "concat",
    }
    made = build_network(ModelConfig.model_validate(tubelets), clip, {}, CLASSES)
    assert made(torch.zeros(2, 4, 3, 16, 16), torch.zeros(2, 16, 16)).pooled.shape == (2, 2 * 8)


def test_fusion_without_frames_or_without_a_projection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="modality=audio has none"):
        ModelConfig.model_validate(FEATURES | {"fusion": "concat", "modality": "audio"})
    path = str(write_config(tmp_path))
    with pytest.raises(ConfigError, match=r"^model.fusion=concat: method analytic has no projection"):
        preflight(load_config(path, ["model.fusion=concat", "method=analytic"]), [1], restart=True)
