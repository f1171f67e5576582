"""Networks of one modality, and which methods can have one."""

from pathlib import Path

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods import method_names
from avcil_dist.models.network import AudioNetwork, Network, VisualNetwork, build_network
from avcil_dist.training.preflight import preflight
from tests.helpers.streams import write_config

SHAPE = {"frames": 2, "positions": 3, "dim": 4}
VISUAL, AUDIO = torch.randn(5, 2, 3, 4), torch.randn(5, 4)


def network(modality: str) -> Network:
    features = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}, "modality": modality}
    return build_network(ModelConfig.model_validate(features), ClipConfig(), SHAPE, 3)


def test_pictures_alone_are_the_mean_over_tokens_projected_and_classified() -> None:
    made = network("visual")
    assert isinstance(made, VisualNetwork)
    output = made(VISUAL, torch.full_like(AUDIO, torch.nan))
    feature = torch.relu(made.visual_proj(VISUAL.mean(dim=(1, 2))))
    torch.testing.assert_close(output.logits, made.classifier(feature))
    torch.testing.assert_close(output.feature, feature)
    assert output.audio is None


def test_sound_alone_is_projected_and_classified() -> None:
    made = network("audio")
    assert isinstance(made, AudioNetwork)
    output = made(torch.full_like(VISUAL, torch.nan), AUDIO)
    feature = torch.relu(made.audio_proj(AUDIO))
    torch.testing.assert_close(output.logits, made.classifier(feature))
    assert output.visual is None
    assert output.pooled is None


def test_a_network_has_no_weights_for_the_other_modality() -> None:
    assert {name.split(".")[0] for name in network("audio").state_dict()} == {"audio_proj", "classifier"}
    assert {name.split(".")[0] for name in network("visual").state_dict()} == {"visual_proj", "classifier"}


def test_an_unused_encoder_is_not_built() -> None:
    gone = {"kind": "videomae", "weights": "/no/such/weights"}
    config = {"visual": gone, "audio": {"kind": "small"}, "modality": "audio"}
    build_network(ModelConfig.model_validate(config), ClipConfig(), {}, 3)
    with pytest.raises(ConfigError, match="no/such"):
        build_network(ModelConfig.model_validate(config | {"modality": "visual"}), ClipConfig(), {}, 3)


def test_avcil_of_one_modality_is_refused_with_the_alternatives(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    with pytest.raises(ConfigError) as raised:
        preflight(load_config(path, ["model.modality=audio"]), [1], restart=True)
    line = str(raised.value)
    assert line.startswith("model.modality=audio: method avcil compares sound with pictures")
    assert ", ".join(name for name in method_names() if name != "avcil") in line
    off = [f"method.{part}=false" for part in ("instance", "class_aware", "attention")]
    preflight(load_config(path, ["model.modality=audio", *off]), [1], restart=True)
