"""Weights of pre-trained encoders: from a file, a folder or the hub, and strictly into a module.

Whatever names a checkpoint uses, nothing of it is unpickled, and nothing is missing or left over without an error.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import huggingface_hub
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avcil_dist.config.schema import TransformerConfig
from avcil_dist.errors import ConfigError

# What only pre-training or a classifier needs; dropped from a checkpoint, everything else must fit.
VIDEOMAE_DROPPED = ("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.", "head.")
AUDIOMAE_DROPPED = ("decoder", "mask_token", "head.")
# The names in the files of VideoMAE's authors, and those of the library that reads them here.
VIDEOMAE_NAMES = (
    (r"^encoder\.(?=patch_embed\.|blocks\.|norm\.)", ""),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.attention."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.q_bias$", ".query.bias"),
    (r"\.v_bias$", ".value.bias"),
)
NESTED = ("model", "module")  # under which authors keep the state dict in a file


def read_weights(config: TransformerConfig, setting: str) -> dict[str, Tensor] | None:
    """The tensors that `weights` names, a file, a folder or a hub name; None for `random`."""
    if config.weights == "random":
        return None
    path = Path(config.weights)
    if not path.exists():
        path = _download(config.weights, setting)
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not files:
            raise ConfigError(f"{setting}: {path} has neither model.safetensors nor pytorch_model.bin; name the file")
        _check_heads(path / "config.json", config.heads, setting)
        path = files[0]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, safetensors.SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise ConfigError(
            f"{setting}: {path} does not read as a file of tensors ({type(error).__name__}); "
            "save its state dict alone, best as .safetensors"
        ) from error
    state = content
    if isinstance(content, Mapping):
        state = next((content[name] for name in NESTED if name in content), content)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConfigError(f"{setting}: {path} is not a state dict; save the names and tensors alone")
    return dict(state)


def rename_videomae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a VideoMAE checkpoint by the library's names.

    Known are the library's own, of today and of before (a prefix, biases apart from their layers), and the authors',
    which hold query, key and value in one matrix.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix("videomae.")
        for pattern, replacement in VIDEOMAE_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".qkv.weight"):
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            renamed |= {f"{name.removesuffix('qkv.weight')}{part}.weight": piece for part, piece in parts}
        else:
            renamed[name] = tensor
    return renamed


def load_strictly(body: nn.Module, state: Mapping[str, Tensor], dropped: tuple[str, ...], where: str) -> None:
    """Load strictly: what is missing, left over or of another shape is an error that names some."""
    expected = body.state_dict()
    given = {key: tensor for key, tensor in state.items() if not key.startswith(dropped)}
    faults = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [key for key in given if key in expected and given[key].shape != expected[key].shape],
    }
    found = [f"{len(keys)} {fault} ({', '.join(keys[:3])})" for fault, keys in faults.items() if keys]
    if found:
        raise ConfigError(
            f"{where}: the weights do not fit the encoder: {'; '.join(found)}; check dim, depth, heads and data.clip "
            f"(keys that begin with {', '.join(dropped)} are dropped)"
        )
    body.load_state_dict(given)


def _check_heads(path: Path, heads: int, setting: str) -> None:
    """The number of heads shapes no tensor: a wrong one would load, and give wrong features."""
    theirs = json.loads(path.read_text()).get("num_attention_heads", heads) if path.exists() else heads
    if theirs != heads:
        raise ConfigError(
            f"{setting}: {path.parent} has {theirs} attention heads, the config {heads}; set heads: {theirs}"
        )


def _download(name: str, setting: str) -> Path:
    """The hub's files for `owner/name`, as a local folder."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", name) or name.endswith((".safetensors", ".pth", ".bin")):
        raise ConfigError(f"{setting}: no such file: {name}; give a path, a hub name owner/name, or random")
    files = ["config.json", "model.safetensors", "pytorch_model.bin"]
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=files)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}: {name} is neither a path nor reachable on the hub ({type(error).__name__}); "
            "give the path of a file or folder of weights"
        ) from error
    return Path(folder)
