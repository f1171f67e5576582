"""Plug-ins: found by metadata, imported by the user's word alone, refused in one line."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from avcil_dist.compose import load_config, override_config
from avcil_dist.config.loader import find_config
from avcil_dist.config.schema import ClipConfig, MethodConfig
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml
from avcil_dist.data.decode import DecodedClip
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method, method_class, method_names
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.models.network import build_network
from avcil_dist.system.plugins import VARIABLE, plug_in_names, trusted
from launch.cluster.schedulers.base import scheduler_of
from tests.helpers.plugins import fresh_plug_ins, install
from tests.helpers.streams import avcil, write_config

__all__ = ["fresh_plug_ins"]
METHOD = """
from avcil_dist.methods.finetune import Finetune
from avcil_dist.config.section import Section

class Mine(Finetune):
    "A method of another package."
    class Options(Section):
        weight: float = 0.5

NOT_A_METHOD = 3
"""


ENCODERS = """
from dataclasses import dataclass

import torch
from torch import nn

from avcil_dist.config.section import Section
from avcil_dist.data.inputs import Pictures, Sound
from avcil_dist.models.encoders.base import AudioEncoder, VisualEncoder

class Colour(VisualEncoder):
    "Mean colour of each frame, of pictures of a size of its own."
    class Options(Section):
        dim: int = 8

    @classmethod
    def preparation(cls, options, clip):
        return Pictures(frames=3, size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

    def __init__(self, options):
        super().__init__(options.dim)
        self.project = nn.Linear(3, options.dim)

    def forward(self, pictures):
        return self.project(pictures.mean(dim=(3, 4)))[:, :, None]

@dataclass(frozen=True)
class Wave(Sound):
    sample_rate: int = 8000
    samples: int = 400

    @property
    def shape(self):
        return (self.samples,)

    def inputs(self, waveform):
        wave = torch.zeros(self.samples)
        wave[: len(waveform)] = waveform[: self.samples]
        return wave

class Raw(AudioEncoder):
    "A linear map of the waveform."
    class Options(Section):
        dim: int = 8
        samples: int = 400

    @classmethod
    def preparation(cls, options, clip):
        return Wave(samples=options.samples)

    def __init__(self, options):
        super().__init__(options.dim)
        self.project = nn.Linear(options.samples, options.dim)

    def forward(self, wave):
        return self.project(wave)
"""


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        method_class(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_found_without_an_import_and_its_code_runs_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "own_one", {"methods": {"mine": "own_one:Mine"}}, METHOD)
    assert plug_in_names("methods", method_names()) == ["mine"]
    assert "own_one" not in sys.modules
    config = load_config(str(write_config(tmp_path)), ["method=mine", "method.weight=0.25"])
    assert config.method.model_dump() == {"name": "mine", "weight": 0.25}
    assert make_method(config.method).options.weight == 0.25
    with pytest.raises(ConfigError, match=r"^command line: method\.wieght: unknown key; did you mean 'weight'"):
        load_config(str(write_config(tmp_path)), ["method=mine", "method.wieght=1"])
    assert refusal("gone").endswith(", mine; if it is a plug-in, install its package here")


def test_a_stream_of_a_reference_has_the_name_of_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "own_two", {}, METHOD)
    config = load_config(str(write_config(tmp_path)), ["method=own_two:Mine", "method.weight=1"])
    assert config.stream_name == "tiny-Mine-seed0"
    assert trusted() == ("own_two:Mine",)


def test_a_name_of_another_packages_or_of_a_built_in_method_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "own_a", {"methods": {"mine": "own_a:Mine", "avcil": "own_a:Mine"}}, METHOD)
    install(monkeypatch, tmp_path, "own_b", {"methods": {"mine": "own_b:Mine", "a b": "own_b:Mine"}}, METHOD)
    assert refusal("avcil").startswith("method.name: the package own_a has a plug-in with the built-in name 'avcil'")
    assert refusal("mine").startswith("method.name: the packages own_a and own_b have plug-ins named 'mine'")
    assert plug_in_names("methods", method_names()) == []
    listed = avcil("methods").output
    assert all(f"refused: the package{text}" in listed for text in (" own_a has", "s own_a and own_b", " own_b has"))
    assert "lwf:" in listed
    assert method_class("lwf")


def test_a_broken_plug_in_is_one_line_and_the_command_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"methods": {"broken": "own_c:Mine", "number": "own_d:NOT_A_METHOD", "gone": "own_d:Gone"}}
    install(monkeypatch, tmp_path, "own_c", {}, "raise RuntimeError('no\\nlicence')")
    install(monkeypatch, tmp_path, "own_d", points, METHOD)
    assert avcil("--help").exit_code == 0
    assert not {"own_c", "own_d"} & set(sys.modules)
    assert refusal("broken") == (
        "method.name: the plug-in 'broken' of the package own_d cannot be imported (RuntimeError: no licence); repair "
        "or uninstall its package"
    )
    assert "no class derived from" in refusal("number")
    assert "AttributeError" in refusal("gone")
    listed = avcil("methods")
    assert listed.exit_code == 0
    assert "broken: not usable: method.name: the plug-in" in listed.output


def test_code_that_only_a_foreign_text_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of a stream, as it comes from a folder or a server, names a module that is installed."""
    package = install(monkeypatch, tmp_path, "own_e", {}, METHOD)
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{METHOD}")
    record = yaml.safe_load(config_to_yaml(load_config(str(write_config(tmp_path)))))
    record["method"] = {"name": "own_e:Mine", "weight": 1.0}
    config = config_from_yaml(yaml.safe_dump(record))
    for use in (lambda: make_method(config.method), lambda: override_config(config, ["optim.lr=0.5"])):
        with pytest.raises(ConfigError, match=f"your own configuration does not name; .*{VARIABLE}=own_e:Mine"):
            use()
    with pytest.raises(ConfigError, match="your own configuration does not name"):
        scheduler_of("own_e:Mine")  # as the record of a chain may have it
    assert not (tmp_path / "ran").exists()
    assert override_config(config, ["method.name=own_e:Mine"]).method.name == "own_e:Mine"
    assert (tmp_path / "ran").exists()


def test_an_entry_point_vouches_for_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "own_f", {"methods": {"mine": "own_f:Mine"}}, METHOD)
    assert make_method(MethodConfig(name="own_f:Mine")).options.weight == 0.5
    with pytest.raises(ConfigError, match="is none of"):
        method_class("own_f.__init__")


def test_configurations_are_found_in_a_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = install(monkeypatch, tmp_path, "own_g", {"configs": {"own_g": "own_g.settings"}})
    (package / "settings" / "benchmark").mkdir(parents=True)
    (package / "settings" / "benchmark" / "theirs.yaml").write_text("name: theirs\n")
    own = tmp_path / "own"
    (own / "method").mkdir(parents=True)
    (own / "theirs.yaml").write_text("extends: demo\n")
    (own / "method" / "finetune.yaml").write_text("name: ncm\n")
    (own / "method" / "soft.yaml").write_text("name: lwf\n")
    assert find_config("theirs") == package / "settings" / "benchmark" / "theirs.yaml"
    monkeypatch.setenv("AVCIL_CONFIG_PATH", f"{own}{os.pathsep}")
    assert find_config("theirs") == package / "settings" / "benchmark" / "theirs.yaml"
    assert load_config(str(write_config(tmp_path)), ["method=soft"]).method.name == "lwf"
    assert load_config(str(write_config(tmp_path)), ["method=finetune"]).method.name == "ncm"  # the user's own word
    assert "own_g" not in sys.modules
    (package / "settings" / "benchmark" / "demo.yaml").write_text("name: other\n")
    with pytest.raises(ConfigError, match="a package has a configuration of the shipped name 'demo'"):
        find_config("demo")


def test_a_file_finds_named_sections_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "soft.yaml").write_text("name: lwf\n")
    path = write_config(tmp_path, method="soft")
    assert load_config(str(path)).method.name == "lwf"


def test_an_encoder_brings_the_preparation_of_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "own_h", {"encoders": {"colour": "own_h:Colour"}}, ENCODERS)
    words = ["model.visual={kind: colour}", "model.audio={kind: 'own_h:Raw', samples: 200}"]
    config = load_config(str(write_config(tmp_path)), words)
    assert config.model.audio.model_dump() == {"kind": "own_h:Raw", "dim": 8, "samples": 200}
    assert config_from_yaml(config_to_yaml(config)) == config
    inputs = clip_inputs(config.model, config.data.clip)
    assert inputs.shapes == ((3, 3, 8, 8), (200,))
    clip = DecodedClip(torch.full((3, 3, 16, 24), 255, dtype=torch.uint8), torch.ones(50))
    visual, audio = ClipTransform(inputs)(clip)
    torch.testing.assert_close(visual, torch.full((3, 3, 8, 8), 2.0))
    assert (audio.shape, float(audio.sum())) == ((200,), 50.0)
    network = build_network(config.model, config.data.clip, {}, 2)
    assert network(visual[None], audio[None]).logits.shape == (1, 2)
    concat = config.model.model_copy(update={"fusion": "concat"})
    assert build_network(concat, config.data.clip, {}, 2)(visual[None], audio[None]).pooled.shape == (1, 3 * 8)


def test_a_fusion_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from avcil_dist.models.fusion import Fusion

class Newest(Fusion):
    def forward(self, sound, frames):
        return sound, frames[:, -1]
"""
    install(monkeypatch, tmp_path, "own_j", {"fusions": {"newest": "own_j:Newest"}}, code)
    config = load_config(str(write_config(tmp_path)), ["model.fusion=newest"])
    network = build_network(config.model, config.data.clip, {"frames": 2, "positions": 3, "dim": 4}, 2)
    visual, audio = torch.randn(1, 2, 3, 4), torch.randn(1, 4)
    changed = torch.cat([visual[:, :1] + 1, visual[:, 1:]], dim=1)
    assert torch.equal(network(visual, audio).logits, network(changed, audio).logits)


def test_faults_of_an_encoders_name_and_options_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"encoders": {"colour": "own_i:Colour", "raw": "own_i:Raw", "small": "own_i:Raw"}}
    install(monkeypatch, tmp_path, "own_i", points, ENCODERS)
    path = str(write_config(tmp_path))
    audio = "model.audio={kind: raw}"
    for word, line in (
        ("{kind: colour, dmi: 3}", "command line: model.visual.dmi: unknown key; did you mean 'dim'?"),
        ("{kind: colour, dim: x}", "command line: model.visual.dim: 'x': Input should be a valid integer"),
        ("{kind: raw}", "command line: model.visual.kind: the plug-in 'raw' is no class derived from"),
        (
            "{kind: gone}",
            "command line: model.visual.kind: 'gone' is none of precomputed, small, videomae, colour, raw",
        ),
        ("{kind: small}", "the package own_i has a plug-in with the built-in name 'small'"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_network(load_config(path, [f"model.visual={word}", audio]).model, ClipConfig(), {}, 2)
        assert line in str(caught.value)
