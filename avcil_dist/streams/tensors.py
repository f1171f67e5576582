"""Tensors in committed folders: safetensors files, and states of tensors and plain values."""

from collections.abc import Mapping
from typing import Any

import safetensors.torch
from pydantic import JsonValue
from safetensors import SafetensorError
from torch import Tensor

from avcil_dist import storage
from avcil_dist.errors import ArtifactError
from avcil_dist.streams.commit import Commit, encode_json, read_committed_file, read_committed_json


def read_committed_tensors(folder: str, name: str, commit: Commit) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of a committed folder, verified. Raises ArtifactError, naming the file.

    Types, shapes and numbers are compared by those who load the tensors into a network, a method or an optimizer.
    """
    data = read_committed_file(folder, name, commit)
    url = storage.join(folder, name)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that torch does not have
        raise ArtifactError(f"{url}: not a file of tensors ({_one_line(error)}); run the step again") from None


def read_state(folder: str, name: str, commit: Commit) -> dict[str, Any]:
    """Return the state of tensors and plain values that `encode_state` encoded, verified.

    Raises ArtifactError, naming the file, as `read_committed_tensors` does.
    """
    plain = read_committed_json(folder, f"{name}.json", commit, dict[str, JsonValue], "the plain values of a state")
    return {**read_committed_tensors(folder, f"{name}.safetensors", commit), **plain}


def encode_state(name: str, state: Mapping[str, Any]) -> dict[str, bytes]:
    """Encode a state of tensors and plain values as two files: `name.safetensors` and `name.json`."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    return {f"{name}.safetensors": encode_tensors(tensors), f"{name}.json": encode_json(plain)}


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Encode tensors as a safetensors file."""
    return safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
