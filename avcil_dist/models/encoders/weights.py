"""Weights of pre-trained encoders: read from a file, a folder or the Hugging Face hub, and loaded strictly.

Nothing is unpickled, and a missing or unexpected parameter is an error.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import safetensors
import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file
from torch import Tensor, nn

from avcil_dist import storage
from avcil_dist.config.encoders import ModelConfig, TransformerConfig
from avcil_dist.errors import AvcilError, ConfigError
from avcil_dist.models.encoders.published import (
    DESCRIPTION,
    WEIGHT_FILES,
    check_published,
    download_weights,
    is_hub_name,
)
from avcil_dist.models.state_dict import mismatches
from avcil_dist.system.file_status import is_there

# Errors of torch's restricted unpickler for files that are damaged, or no pickles at all.
DAMAGE = (
    *(UnpicklingError, safetensors.SafetensorError, RuntimeError, OSError, EOFError, ValueError, TypeError),
    *(LookupError, AttributeError, AssertionError, OverflowError, MemoryError, struct.error),
)
NESTED = ("model", "module")  # keys under which authors store the state dict in a file


def read_weights(config: TransformerConfig, setting: str) -> dict[str, Tensor] | None:
    """Return the tensors of `config.weights`: a file, a folder, or a name on the hub. None for `random`.

    Raises ConfigError, naming `setting`, for weights that cannot be found or read.
    """
    if config.weights == "random":
        return None
    path = find_weights(config, setting)
    if path != Path(config.weights):  # of a folder, which has a description
        _check_heads(path.parent / DESCRIPTION, config.heads, setting)
    try:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not a regular file")
        if path.suffix == ".safetensors":
            return of_encoder(load_file(path), setting)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise ConfigError(
            f"{setting}: {path} does not read as a file of tensors ({type(error).__name__}); "
            "save its state dict alone, best as .safetensors"
        ) from error
    state = content
    if isinstance(content, Mapping):
        state = next((content[name] for name in NESTED if name in content), content)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()
    ):
        raise ConfigError(f"{setting}: {path} is not a state dict; save the names and tensors alone")
    return dict(state)


def of_encoder(state: dict[str, Tensor], setting: str) -> dict[str, Tensor]:
    """Return the encoder of the setting from the weights of a step artifact; weights of other origin stay.

    `setting` is model.visual.weights or model.audio.weights.
    """
    prefix = f"{setting.split('.')[1]}_encoder.body."
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return own or state


def find_weights(config: TransformerConfig, setting: str) -> Path:
    """Return the file of `config.weights`: a path, a folder's file, or the local copy of a name on the hub.

    Weights of the hub are downloaded where there is no local copy. Raises ConfigError, naming `setting`.
    """
    path = Path(config.weights)
    if not _exists(path):
        path = _download(config.weights, setting)
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).exists()]
        if not files:
            raise ConfigError(f"{setting}: {path} has neither {' nor '.join(WEIGHT_FILES)}; name the file")
        path = files[0]
    return path


def weights_digests(model: ModelConfig) -> dict[str, str]:
    """Return the sha256 of the pre-trained weights by setting, such as `model.visual.weights`.

    Raises ConfigError for weights that cannot be found, DataError for a file that is not the published one.
    """
    digests = {}
    for section, encoder in (("model.visual", model.visual), ("model.audio", model.audio)):
        if encoder not in model.used or not isinstance(encoder, TransformerConfig) or encoder.weights == "random":
            continue
        setting = f"{section}.weights"
        path = find_weights(encoder, setting)
        digests[setting] = storage.sha256_file(str(path.resolve()))
        if not _exists(Path(encoder.weights)):
            check_published(encoder.weights, path, digests[setting])
    return digests


def load_strictly(body: nn.Module, state: Mapping[str, Tensor], dropped: tuple[str, ...], where: str) -> None:
    """Load `state` into `body`, without the keys that begin with one of `dropped`.

    Raises ConfigError, with examples, for parameters that are missing, unexpected or of another shape.
    """
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(dropped)}
    problems = mismatches(body, kept, exact_types=False)
    if problems:
        raise ConfigError(
            f"{where}: weights do not fit the encoder: {problems}; check dim, depth, heads and data.clip "
            f"(keys that begin with {', '.join(dropped)} are dropped)"
        )
    body.load_state_dict(kept)


class _HubConfig(BaseModel):
    """The number of attention heads in a hub's `config.json`."""

    heads: int | None = Field(None, alias="num_attention_heads")


def _exists(path: Path) -> bool:
    try:
        return is_there(path)
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"weights: {str(path)[:100]}: {error.strerror}; give the path of a file or folder") from None


def _check_heads(path: Path, heads: int, setting: str) -> None:
    """Compare the number of heads with the checkpoint's: no shape depends on it, so a wrong one would load."""
    if not path.exists():
        return
    theirs = storage.read_json(str(path), _HubConfig, "the configuration of a model", fault=ConfigError).heads
    if theirs not in (None, heads):
        raise ConfigError(
            f"{setting}: {path.parent} has {theirs} attention heads, the config {heads}; set heads: {theirs}"
        )


def _download(name: str, setting: str) -> Path:
    """Return the local folder of a name on the hub, downloaded where there is none."""
    if not is_hub_name(name):
        raise ConfigError(f"{setting}: no such file: {name}; give a path, a hub name owner/name, or random")
    try:
        return download_weights(name)
    except AvcilError as error:
        raise ConfigError(
            f"{setting}: {name} is neither a path nor reachable on the hub ({error}); on a machine with a network: "
            f"avcil weights get {name}"
        ) from None
