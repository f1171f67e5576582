"""Atomic commits of folders: files first, then `COMMITTED.json` with the size and the digest of each file.

A folder without `COMMITTED.json` does not count. Readers verify every file against its digest.
"""

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
    """Write files and return their digests, for `write_commit`."""
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return {name: {"size": len(data), "sha256": storage.sha256(data)} for name, data in files.items()}


def write_commit(folder: str, files: FileDigests, **fields: Any) -> None:
    """Commit a folder whose files are written. `fields` are stored beside the digests."""
    storage.write_json(storage.join(folder, COMMITTED), {"format": FORMAT, "files": files, **fields})


def has_commit(folder: str) -> bool:
    """Whether the folder is committed. The files are not verified."""
    return storage.exists(storage.join(folder, COMMITTED))


def read_commit(folder: str) -> dict[str, Any]:
    """Return the commit of a folder. Raises ArtifactError when it is missing, damaged or of another format."""
    try:
        commit: Any = storage.read_json(storage.join(folder, COMMITTED))
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if not isinstance(commit, dict) or not isinstance(commit.get("files", {}), dict):
        raise ArtifactError(f"{storage.join(folder, COMMITTED)}: damaged; run the step again")
    if commit.get("format") != FORMAT or "files" not in commit:
        raise ArtifactError(f"{folder}: of format {commit.get('format')}, this program reads {FORMAT}")
    return dict(commit)


def read_committed_file(folder: str, name: str, commit: Mapping[str, Any]) -> bytes:
    """Return a file of a committed folder, verified. Raises ArtifactError, naming the file."""
    url, digest = storage.join(folder, name), commit["files"][name]
    try:
        data = storage.read_bytes(url)
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if len(data) != digest["size"] or storage.sha256(data) != digest["sha256"]:
        raise ArtifactError(_damaged(url))
    return data


def read_verified_commit(folder: str) -> dict[str, Any]:
    """Return the commit of a folder after verifying each of its files. Raises ArtifactError, naming the file."""
    commit = read_commit(folder)
    for name in commit["files"]:
        verify_file(folder, name, commit)
    return commit


def verify_file(folder: str, name: str, commit: Mapping[str, Any]) -> None:
    """Compare a file with its digest in chunks, so that a large file need not fit in memory.

    Raises ArtifactError, naming the file.
    """
    url = storage.join(folder, name)
    try:
        digest = storage.sha256_file(url)
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if digest != commit["files"][name]["sha256"]:
        raise ArtifactError(_damaged(url))


def encode_json(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def encode_state(name: str, state: Mapping[str, Any]) -> dict[str, bytes]:
    """Encode a state of tensors and plain values as two files: `name.safetensors` and `name.json`."""
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    return {f"{name}.safetensors": safetensors.torch.save(tensors), f"{name}.json": encode_json(plain)}


def decode_state(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The inverse of `encode_state`."""
    plain: dict[str, Any] = json.loads(files[f"{name}.json"])
    return safetensors.torch.load(files[f"{name}.safetensors"]) | plain


def _damaged(url: str) -> str:
    return f"{url}: damaged, its digest is not the one committed; restore it or run the step again"
