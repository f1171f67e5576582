"""Folders that count only when they are whole: files first, `COMMITTED.json` with size and digest of each last."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from avcil_dist import storage
from avcil_dist.errors import ArtifactError, DataError

FORMAT = 1
COMMITTED = "COMMITTED.json"

FileDigests = dict[str, dict[str, Any]]


def write_files(folder: str, files: Mapping[str, bytes]) -> FileDigests:
    """Write files; what the commit is to say of each."""
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return {name: {"size": len(data), "sha256": storage.sha256(data)} for name, data in files.items()}


def commit(folder: str, files: FileDigests, **said: Any) -> None:
    """Make the folder count. `said` is kept beside the records of its files."""
    storage.write_json(storage.join(folder, COMMITTED), {"format": FORMAT, "files": files, **said})


def is_committed(folder: str) -> bool:
    """Whether the folder is there, whole."""
    return storage.exists(storage.join(folder, COMMITTED))


def read_commit(folder: str) -> dict[str, Any]:
    """The commit of a folder that has one. Raises ArtifactError when it is damaged or of another format."""
    try:
        committed: dict[str, Any] = storage.read_json(storage.join(folder, COMMITTED))
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if committed.get("format") != FORMAT:
        raise ArtifactError(f"{folder}: of format {committed.get('format')}, this program reads {FORMAT}")
    return committed


def read_file(folder: str, name: str, committed: Mapping[str, Any]) -> bytes:
    """A file of a committed folder, held against its digest. Raises ArtifactError, naming it."""
    url, record = storage.join(folder, name), committed["files"][name]
    try:
        data = storage.read_bytes(url)
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if len(data) != record["size"] or storage.sha256(data) != record["sha256"]:
        raise ArtifactError(_damaged(url))
    return data


def read_whole_commit(folder: str) -> dict[str, Any]:
    """The commit of a folder, each of whose files is held against its digest. Raises ArtifactError as `read_file`."""
    commit = read_commit(folder)
    for name in commit["files"]:
        check_file(folder, name, commit)
    return commit


def check_file(folder: str, name: str, committed: Mapping[str, Any]) -> None:
    """Hold a file against its digest without keeping it in memory. Raises ArtifactError as `read_file` does."""
    url = storage.join(folder, name)
    try:
        digest = storage.sha256_file(url)
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if digest != committed["files"][name]["sha256"]:
        raise ArtifactError(_damaged(url))


def encode_json(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def encode_state(name: str, state: Mapping[str, Any]) -> dict[str, bytes]:
    """A state of tensors and plain values as two files: `name.safetensors` and `name.json`."""
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    return {f"{name}.safetensors": safetensors.torch.save(tensors), f"{name}.json": encode_json(plain)}


def decode_state(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The inverse of `encode_state`."""
    plain: dict[str, Any] = json.loads(files[f"{name}.json"])
    return safetensors.torch.load(files[f"{name}.safetensors"]) | plain


def _damaged(url: str) -> str:
    return f"{url}: damaged, its digest is not the one committed; restore it or run the step again"
