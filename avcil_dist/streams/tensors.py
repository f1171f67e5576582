"""Tensors in committed folders: safetensors files, and states of tensors and plain values."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from torch import Tensor

from avcil_dist import storage
from avcil_dist.errors import ArtifactError
from avcil_dist.streams.commit import Commit, encode_json, read_committed_file, read_committed_json

ALIGNMENT = 8  # of a safetensors file's data, and the bytes of the length at its beginning
TYPES = {  # names of types in safetensors files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


def write_tensors(url: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous tensors in host memory as a safetensors file, without a copy of them.

    Returns the file's size and digest. Other threads run meanwhile: hashing and writing release the interpreter's lock.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so all are aligned
    header: dict[str, Any] = {}
    size = 0
    for name, value in ordered:
        header[name] = {
            "dtype": TYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [size, size + value.nbytes],
        }
        size += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(ALIGNMENT, "little") + text
    digest = hashlib.sha256(head)
    with storage.new_file(url) as file:
        file.write(head)
        for _, value in ordered:
            data = value.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), storage.CHUNK_BYTES):
                chunk = data[start : start + storage.CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
    return {"size": len(head) + size, "sha256": digest.hexdigest()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
