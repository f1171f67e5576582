"""Fusion of frames, and the modules of methods in the network, against attention written out in plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from avcil_dist.models.extension import Extension
from avcil_dist.models.fusion import TransformerFusion
from avcil_dist.models.network import (
    AudioVisualNetwork,
    HeadedNetwork,
    Network,
    VisualNetwork,
    build_network,
)
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.models.state_dict import load_whole_state
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
    for fusion, counts in (("concat", True), ("transformer", True), ("attention", False)):
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
    output = student(visual, audio, teacher.attention_view(visual[exemplars], audio[exemplars])[0])
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
    for fusion in ("concat", "transformer"):
        with pytest.raises(ValidationError, match=f"fusion={fusion} is about frames, and modality=audio has none"):
            ModelConfig.model_validate(FEATURES | {"fusion": fusion, "modality": "audio"})
    assert ModelConfig.model_validate(FEATURES | {"fusion": "sum"}).fusion == "attention"
    path = str(write_config(tmp_path))
    with pytest.raises(ConfigError, match=r"^model.fusion=concat: method analytic has no projection"):
        preflight(load_config(path, ["model.fusion=concat", "method=analytic"]), [1], restart=True)
    with pytest.raises(ConfigError, match=r"^command line: model.fusion: 'concta' is none of attention, concat, trans"):
        load_config(path, ["model.fusion=concta"])


def test_the_transformer_mixes_sound_and_frames_by_two_pre_norm_blocks() -> None:
    made, (visual, audio) = network(fusion="transformer"), inputs()
    assert isinstance(made, AudioVisualNetwork)
    assert isinstance(made.fusion, TransformerFusion)
    frames = (spatial_attention(made, visual, audio) * visual).sum(dim=2)
    tokens = torch.cat([audio[:, None], frames], dim=1) + made.fusion.positions
    for block in made.fusion.blocks:
        weights = dict(block.named_parameters())
        heads = block.num_heads
        attention = torch.nn.MultiheadAttention(DIM, heads, batch_first=True)
        names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
        names |= {"out_proj.weight": "out.weight", "out_proj.bias": "out.bias"}
        attention.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()})
        normal = F.layer_norm(tokens, (DIM,))
        tokens = tokens + attention(normal, normal, normal)[0]
        tokens = tokens + block.mlp(F.layer_norm(tokens, (DIM,)))
    mixed = F.layer_norm(tokens, (DIM,))
    output = made(visual, audio)
    torch.testing.assert_close(output.pooled, mixed[:, 1:].mean(dim=1))
    torch.testing.assert_close(output.audio, torch.relu(made.audio_proj(mixed[:, 0])))
    first, second = (block.qkv.weight for block in made.fusion.blocks)
    assert not torch.equal(first, second)
    alone = network(fusion="transformer", modality="visual")
    assert alone(visual, audio).pooled.shape == (BATCH, DIM)


class Prompts(Extension):
    """Prompts beside the positions of each frame, and a bias of the logits that grows with the head."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.ones(2, dim))
        self.bias = nn.Parameter(torch.full((num_classes,), 3.0))

    def adapt(self, sound: Any, tokens: Any) -> tuple[Any, Any]:
        shape = (*tokens.shape[:2], *self.prompts.shape)
        return 2 * sound, torch.cat([tokens, self.prompts.expand(shape)], dim=2)

    def refine(self, output: Output) -> Output:
        return output._replace(logits=output.logits + self.bias)

    def grow(self, num_classes: int) -> None:
        self.bias = nn.Parameter(F.pad(self.bias.data, (0, num_classes - len(self.bias))))


@pytest.mark.parametrize("fusion", ["attention", "concat"])
def test_a_methods_own_parameters_are_part_of_the_network(fusion: str) -> None:
    made, (visual, audio) = network(fusion=fusion), inputs()
    torch.manual_seed(0)
    model = ModelConfig.model_validate(FEATURES | {"fusion": fusion})
    extended = build_network(model, ClipConfig(), SHAPE, CLASSES, network_spec=NetworkSpec(extension=Prompts))
    assert isinstance(extended, HeadedNetwork)
    prompted = torch.cat([visual, torch.ones(BATCH, FRAMES, 2, DIM)], dim=2)
    torch.testing.assert_close(extended(visual, audio).logits, made(prompted, 2 * audio).logits + 3.0)
    assert {"extension.prompts", "extension.bias"} <= set(extended.state_dict())
    assert isinstance(extended, AudioVisualNetwork)
    assert extended.attention_view(visual[1:], audio[1:])[0].visual.shape[2] == POSITIONS + 2
    extended(visual, audio).logits.sum().backward()
    assert extended.extension.prompts.grad.abs().sum() > 0
    extended.grow(CLASSES + 2)
    assert extended(visual, audio).logits.shape == (BATCH, CLASSES + 2)
    load_whole_state(
        build_network(model, ClipConfig(), SHAPE, CLASSES + 2, network_spec=NetworkSpec(extension=Prompts)),
        extended.state_dict(),
        "here",
    )
