"""Atomic commits of folders: files first, then `COMMITTED.json` with the size and the digest of each file.

A folder without `COMMITTED.json` does not count. A reader opens only files that the commit lists, each a regular file
directly in the folder, and compares it with its digest. Nothing is unpickled.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from avcil_dist import storage
from avcil_dist.errors import ArtifactError, DataError

FORMAT = 1
COMMITTED = "COMMITTED.json"
MAX_BYTES = 1 << 50

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileDigests = dict[str, dict[str, Any]]  # as written: size and sha256 by file name
T = TypeVar("T")


class FileDigest(BaseModel):
    """Size in bytes and digest of a committed file."""

    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=0, le=MAX_BYTES)
    sha256: Sha256


class Commit(BaseModel):
    """Content of `COMMITTED.json`. Kinds of folders have fields of their own; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: Literal[1]
    files: dict[FileName, FileDigest]


C = TypeVar("C", bound=Commit)


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


def read_commit(folder: str, kind: type[C]) -> C:
    """Return the commit of a folder. Raises ArtifactError when it is missing, damaged or of another format."""
    try:
        return storage.read_json(
            storage.join(folder, COMMITTED), kind, f"a commit of format {FORMAT}", fault=ArtifactError
        )
    except DataError as error:
        raise ArtifactError(str(error)) from None


def parse_commit(data: bytes, kind: type[C], where: str) -> C:
    """Return the commit of the bytes of a `COMMITTED.json`. Raises ArtifactError as `read_commit` does."""
    return storage.parse_json(data, kind, f"a commit of format {FORMAT}", where, fault=ArtifactError)


def read_committed_file(folder: str, name: str, commit: Commit) -> bytes:
    """Return a file of a committed folder, verified. Raises ArtifactError, naming the file."""
    url, digest = _committed(folder, name, commit)
    try:
        data = storage.read_bytes(url) if storage.size(url) == digest.size else b""
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if len(data) != digest.size or storage.sha256(data) != digest.sha256:
        raise ArtifactError(_damaged(url))
    return data


def read_committed_json(folder: str, name: str, commit: Commit, kind: type[T], what: str) -> T:
    """Return a json file of a committed folder as a `kind` (see `storage.parse_json`), verified.

    Raises ArtifactError, naming the file.
    """
    url, digest = _committed(folder, name, commit)
    if digest.size > storage.MAX_JSON_BYTES:
        raise ArtifactError(f"{url}: larger than {storage.MAX_JSON_BYTES} bytes; it is not what belongs here")
    return storage.parse_json(read_committed_file(folder, name, commit), kind, what, url, fault=ArtifactError)


def read_verified_commit(folder: str, kind: type[C]) -> C:
    """Return the commit of a folder after verifying each of its files. Raises ArtifactError, naming the file."""
    commit = read_commit(folder, kind)
    for name in commit.files:
        verify_file(folder, name, commit)
    return commit


def verify_file(folder: str, name: str, commit: Commit) -> None:
    """Compare a file with its digest in chunks, so that a large file need not fit in memory.

    Raises ArtifactError, naming the file.
    """
    url, digest = _committed(folder, name, commit)
    try:
        is_same = storage.size(url) == digest.size and storage.sha256_file(url) == digest.sha256
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if not is_same:
        raise ArtifactError(_damaged(url))


def encode_json(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _committed(folder: str, name: str, commit: Commit) -> tuple[str, FileDigest]:
    """The url and the digest of a file that the commit lists."""
    if name not in commit.files:
        raise ArtifactError(
            f"{storage.join(folder, COMMITTED)}: does not list {name}; restore it, or run the step again"
        )
    return storage.join(folder, name), commit.files[name]


def _damaged(url: str) -> str:
    return f"{url}: damaged, its digest is not the one committed; restore it or run the step again"
