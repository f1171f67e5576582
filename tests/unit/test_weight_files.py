"""Files in the place of an encoder's weights: one line each."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from avcil_dist.models.network import build_network
from tests.unit.test_encoders import videomae, weights_of

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3\n"
NO_WEIGHTS = {
    "bytes": b"\x00\x01nothing of the kind",
    "empty": b"",
    "text": b"hello\nworld\n",
    "number": b"7",
    "lfs-pointer": LFS_POINTER,
    "html": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "json": b'{"message": "Not Found"}',
    "zip": b"PK\x05\x06" + bytes(18),
    "zip-begin": b"PK\x03\x04" + bytes(100),
    "pickle-of-none": b"\x80\x02N.",
    "pickle-of-nothing": b"\x80\x02.",
    "pickle-get": b"\x80\x02h\x05.",
    "pickle-deep": b"\x80\x02N" + b"\x85" * 100_000 + b".",
    "header-of-a-petabyte": (1 << 50).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("content", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_a_damaged_file_is_a_config_error(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"damaged.{ending}").write_bytes(content)
    with pytest.raises(ConfigError, match=r"does not read as a file of tensors|is not a state dict") as caught:
        videomae(tmp_path / f"damaged.{ending}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("cut", [10, 1000, -1, -100])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_file_cut_by_a_download_is_a_config_error(tmp_path: Path, ending: str, cut: int) -> None:
    path = tmp_path / f"weights.{ending}"
    state = weights_of(videomae())
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match="does not read as a file of tensors"):
        videomae(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"num_attention_heads": "4"}', "[" * 100_000])
def test_a_broken_description_beside_the_weights_is_a_config_error(tmp_path: Path, text: str) -> None:
    save_file(weights_of(videomae()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: not "):
        videomae(tmp_path)


@pytest.mark.parametrize(
    "change", [lambda w: w.to(torch.int8), lambda w: w * torch.nan, lambda w: w.to_sparse(), lambda w: w + 1j]
)
def test_weights_that_are_no_numbers_of_a_network_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    state = weights_of(videomae())
    name = next(name for name, values in state.items() if values.ndim == 2)
    torch.save(state | {name: change(state[name])}, tmp_path / "bad.pth")
    with pytest.raises(ConfigError, match=r"1 of another type|1 not finite|does not read"):
        videomae(tmp_path / "bad.pth")


def test_a_pipe_and_a_name_of_any_length_are_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError) as caught:
            videomae(path)
        assert len(str(caught.value).splitlines()) == 1


def test_encoders_of_a_step_artifact_are_weights_of_encoders(tmp_path: Path) -> None:
    tiny = {"weights": "random", "dim": 24, "depth": 1, "heads": 2}
    clip = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
    trained = {"visual": {"kind": "videomae", **tiny, "train": "full"}, "audio": {"kind": "audiomae", **tiny}}
    torch.manual_seed(0)
    network = build_network(ModelConfig.model_validate(trained), clip, {}, num_classes=2)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    kinds = {name: {**section, "weights": str(tmp_path)} for name, section in trained.items()}
    torch.manual_seed(1)
    loaded = build_network(ModelConfig.model_validate(kinds), clip, {}, num_classes=2)
    for encoder in ("visual_encoder", "audio_encoder"):
        for name, value in network.get_submodule(encoder).state_dict().items():
            assert torch.equal(loaded.get_submodule(encoder).state_dict()[name], value), name
    assert not torch.equal(loaded.get_submodule("classifier").weight, network.get_submodule("classifier").weight)
