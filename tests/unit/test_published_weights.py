"""Weights of the hub: from a real local server of its API, kept for runs without a network, verified, recorded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.models.encoders import published
from avcil_dist.models.encoders.published import PUBLISHED, check_published, split_name
from avcil_dist.models.encoders.weights import weights_digests
from avcil_dist.storage import sha256
from tests.helpers.commands import PROJECT
from tests.helpers.published_server import COMMIT, PublishedServer

NAME = "somebody/encoder"


def _avcil(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "avcil_dist", *words]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=kept | variables)


@pytest.mark.slow
def test_weights_are_got_once_and_are_there_without_a_network(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "made.safetensors")
    data = (tmp_path / "made.safetensors").read_bytes()
    files = {"model.safetensors": data, "config.json": b"{}", "pytorch_model.bin": bytes(1000), "README.md": b"no"}
    home = {"HF_HOME": str(tmp_path / "hub")}
    with PublishedServer(tmp_path, {NAME: files}) as server:
        got = _avcil("weights", "get", NAME, HF_ENDPOINT=server.url, **home)
        asked = {path for _, path, _ in server.requests if "/resolve/" in path}
    assert got.returncode == 0, got.stderr
    assert f"commit {COMMIT}" in got.stdout
    assert f"sha256 {sha256(data)}" in got.stdout
    assert asked == {f"/{NAME}/resolve/{COMMIT}/{name}" for name in ("model.safetensors", "config.json")}

    again = _avcil("weights", "get", NAME, HF_HUB_OFFLINE="1", **home)
    assert again.returncode == 0, again.stderr
    assert f"model.….weights={NAME}@{COMMIT}" in again.stdout

    missing = _avcil("weights", "get", "videomae", HF_HUB_OFFLINE="1", **home)
    assert missing.returncode == 2
    assert "HF_HUB_OFFLINE is set" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_names_have_the_pinned_revision_or_their_own() -> None:
    assert split_name("MCG-NJU/videomae-base") == ("MCG-NJU/videomae-base", PUBLISHED["videomae"].revision)
    assert split_name("MCG-NJU/videomae-base@v1") == ("MCG-NJU/videomae-base", "v1")
    assert split_name("some-body/a.b_c") == ("some-body/a.b_c", "main")
    with pytest.raises(ConfigError, match="not a name on the hub"):
        split_name("no name")


def test_a_file_that_is_not_the_published_one_is_refused() -> None:
    name, known = "MCG-NJU/videomae-base", PUBLISHED["videomae"]
    assert known.sha256
    check_published(name, Path("x/model.safetensors"), known.sha256)
    check_published(f"{name}@other", Path("x/model.safetensors"), "0" * 64)
    with pytest.raises(DataError, match="not the published weights"):
        check_published(name, Path("x/model.safetensors"), "0" * 64)


def test_the_shipped_configurations_name_the_published_weights() -> None:
    from avcil_dist.compose import load_config

    model = load_config("ave_ci_video").model
    assert {published.split_name(encoder.weights)[0] for encoder in model.used} == {  # type: ignore[union-attr]
        known.repository for known in PUBLISHED.values()
    }


def test_digests_are_those_of_the_files_that_the_modality_uses(tmp_path: Path) -> None:
    (tmp_path / "visual.pth").write_bytes(b"v")
    (tmp_path / "model.safetensors").write_bytes(b"a")
    settings = {
        "visual": {"kind": "videomae", "weights": str(tmp_path / "visual.pth")},
        "audio": {"kind": "audiomae", "weights": str(tmp_path)},
    }
    both = {"model.visual.weights": sha256(b"v"), "model.audio.weights": sha256(b"a")}
    assert weights_digests(ModelConfig.model_validate(settings)) == both
    both.pop("model.audio.weights")
    assert weights_digests(ModelConfig.model_validate(settings | {"modality": "visual"})) == both
    settings["visual"]["weights"] = "random"
    assert weights_digests(ModelConfig.model_validate(settings | {"modality": "visual"})) == {}
