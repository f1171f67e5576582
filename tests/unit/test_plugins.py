"""Plug-ins: found by metadata, imported by the user's word alone, refused in one line."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from avcil_dist.compose import load_config, override_config
from avcil_dist.config.loader import find_config
from avcil_dist.config.schema import MethodConfig
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method, method_class, method_names
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
    assert "mine" in refusal("gone")


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
