"""The encoders of other libraries that the documents show, with random weights, as encoders of another package."""

from pathlib import Path

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import ClipConfig
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.models.network import build_network
from tests.helpers.documents import PROJECT, blocks
from tests.helpers.plugins import fresh_plug_ins, install
from tests.helpers.streams import write_config

__all__ = ["fresh_plug_ins"]


def test_backbones_of_timm_and_transformers_are_one_class_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [block.text for block in blocks(PROJECT / "docs" / "extending.md") if "Encoder(" in block.text]
    code = "from avcil_dist.config.section import Section\n" + "\n".join(shown)
    points = {"encoders": {"timm": "own_k:TimmEncoder", "jepa": "own_k:VJepa2Encoder", "ast": "own_k:AstEncoder"}}
    install(monkeypatch, tmp_path, "own_k", points, code)
    audio = "model.audio={kind: ast, dim: 192, depth: 1, heads: 3}"
    for visual, size, frames in (
        ("kind: timm, architecture: vit_tiny_patch16_224", 224, 2),
        ("kind: jepa, dim: 192, depth: 1, heads: 3, size: 32", 32, 1),
    ):
        config = load_config(str(write_config(tmp_path)), [f"model.visual={{{visual}}}", audio])
        clip = ClipConfig(frames=2, mel_frames=64)
        inputs = clip_inputs(config.model, clip)
        assert inputs.shapes == ((2, 3, size, size), (64, 128))
        network = build_network(config.model, clip, {}, 2).eval()
        with torch.no_grad():
            output = network(torch.zeros(1, *inputs.shapes[0]), torch.zeros(1, *inputs.shapes[1]))
            tokens = network.visual_encoder(torch.zeros(1, *inputs.shapes[0]))
        assert output.feature.shape == (1, 192)
        assert tokens.shape == (1, frames, (size // 16) ** 2, 192)
        assert network.visual_encoder.num_frames == frames
