"""Repositories of the Hugging Face hub: commits, sizes and digests of files, local copies of weights, uploads.

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

from avcil_dist.errors import AvcilError, ConfigError, DataError, StorageError
from avcil_dist.storage.local import REFUSED

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
OWN_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
DENIED = (401, 403)  # answers of the hub
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


def check_upload(setting: str, repository: str) -> None:
    """Raise ConfigError, naming `setting`, for a name, a token or an environment with which no upload can succeed."""
    if not OWN_REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{setting}: {repository[:100]!r} is no repository of the hub; give OWNER/NAME")
    if is_offline():
        raise ConfigError(f"{setting}: HF_HUB_OFFLINE is set; unset it on a machine with a network")
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"{setting}: no token of the hub; set HF_TOKEN to one that can write, or use: hf auth login")


def upload_folder(repository: str, folder: Path, message: str, *, is_private: bool) -> str:
    """Upload the files of a folder in one commit and return its url; the repository is made if it is not there.

    One that is there stays as public as it is. Raises StorageError, one line, where the hub refuses or does not answer.
    """
    api = huggingface_hub.HfApi(endpoint=endpoint())
    try:
        api.create_repo(repository, private=is_private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url)
    except FAULTS as error:
        if _status(error) in DENIED:
            where = f"{repository} at {endpoint()}"
            raise StorageError(f"{where}: the hub refuses the upload; set HF_TOKEN to a token that can write") from None
        raise hub_fault(repository, "main", error) from None


def _status(error: Exception) -> int | None:
    answer = getattr(error, "response", None)
    return getattr(answer, "status_code", None)


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
