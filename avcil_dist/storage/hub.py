"""Repositories of the Hugging Face hub: commits, sizes and digests of files, and the local copies of weights.

The hub's own client decides by its variables: HF_ENDPOINT (a mirror), HF_HOME (the local copies), HF_HUB_OFFLINE.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
from httpx2 import HTTPError
from huggingface_hub import constants
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from avcil_dist.errors import AvcilError, DataError, StorageError
from avcil_dist.storage.local import REFUSED

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
# the client's own errors are of several families; a mirror that answers nonsense raises ValueError or TypeError
FAULTS = (HTTPError, OSError, ValueError, TypeError, AssertionError)


@dataclass(frozen=True)
class HubFile:
    """Size in bytes, and the sha256 that the hub has for a large file."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class HubRevision:
    """A repository at a commit."""

    repository: str
    kind: Kind
    commit: str
    files: dict[str, HubFile]

    def url(self, path: str) -> str:
        """Return the url of a file."""
        return huggingface_hub.hf_hub_url(self.repository, path, repo_type=self.kind, revision=self.commit)


def hub_revision(repository: str, kind: Kind, revision: str) -> HubRevision:
    """Return a repository at a commit, branch or tag. Raises StorageError where the hub does not answer, or refuses."""
    api = huggingface_hub.HfApi()
    look_up = api.model_info if kind == "model" else api.dataset_info
    try:
        info = look_up(repository, revision=revision, files_metadata=True, timeout=30.0)
    except FAULTS as error:
        mirror = "set HF_ENDPOINT to a mirror" if kind == "model" else "give a mirror with --from, or by HF_ENDPOINT"
        raise hub_fault(repository, revision, error, mirror) from None
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise StorageError(f"{repository}: the hub at {endpoint()} names no commit of {revision}; check HF_ENDPOINT")
    files = {file.rfilename: HubFile(file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings or []}
    return HubRevision(repository, kind, info.sha, files)


def local_snapshot(repository: str, revision: str, files: list[str]) -> Path | None:
    """Return the folder of a model's files that were downloaded before; None where there is none. No network."""
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=files, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    except OSError as error:
        raise StorageError(f"{cache_folder()}: cannot be read ({error}); set HF_HOME to another folder") from None
    return Path(found)


def download_snapshot(repository: str, revision: str, files: list[str]) -> Path:
    """Download a model's files into the hub's cache and return their folder. Raises StorageError, one line."""
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    except FAULTS as error:
        raise hub_fault(repository, revision, error) from None


def hub_fault(
    repository: str, revision: str, error: Exception, mirror: str = "set HF_ENDPOINT to a mirror"
) -> AvcilError:
    """Return an error of the hub's client as one line that names the remedy."""
    where = f"{repository} ({revision[:12]}) at {endpoint()}"
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return StorageError(
            f"{where}: not among the local copies in {cache_folder()}, and HF_HUB_OFFLINE is set; unset it on a "
            f"machine with a network, set HF_HOME to the folder that has it, or {mirror}"
        )
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return DataError(f"{where}: no such repository or revision, or it needs a login (HF_TOKEN)")
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, OSError) and cause.errno in REFUSED:
        return StorageError(
            f"{cache_folder()}: cannot be written ({cause.strerror}); make room, or set HF_HOME to another folder"
        )
    text = " ".join(str(cause).split())[:160] or type(cause).__name__
    return StorageError(f"{where}: {text}; check the network, or {mirror}")


def endpoint() -> str:
    """Return the address of the hub, or of the mirror that HF_ENDPOINT names."""
    return str(constants.ENDPOINT)


def cache_folder() -> str:
    """Return the folder of local copies."""
    return str(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether the environment forbids requests to the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
