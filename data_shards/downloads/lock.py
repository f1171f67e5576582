"""Lock of downloaded files: source, revision, size and digest of each, recorded by the first download.

`downloads.json` lies beside the files. A later download must have the same digests, whatever mirror it comes from.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from avcil_dist import storage
from avcil_dist.errors import DataError
from data_shards.downloads.sources import SourceFile

LOCK = "downloads.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LockedFile(BaseModel):
    """A file as it was downloaded first."""

    model_config = ConfigDict(frozen=True)

    source: str = Field(max_length=2000)
    revision: str = Field("", max_length=200)
    bytes: int = Field(ge=0, le=1 << 50)
    sha256: Sha256


class Lock(BaseModel):
    """Files by path. `imported` is the digest of the files and the output that shards were last made of."""

    model_config = ConfigDict(frozen=True)

    files: dict[Annotated[str, Field(max_length=500)], LockedFile] = {}
    imported: str = Field("", max_length=64)


def read_lock(folder: Path) -> Lock:
    """Return the lock of a folder; an empty one where there is none. Raises DataError for a damaged one."""
    url = str(folder / LOCK)
    if not storage.exists(url):
        return Lock()
    return storage.read_json(url, Lock, "the lock of downloaded files", remedy="remove it to record the files anew")


def write_lock(folder: Path, lock: Lock) -> None:
    """Write the lock of a folder."""
    storage.write_json(str(folder / LOCK), lock.model_dump())


def check_digest(file: SourceFile, path: Path, digest: str, lock: Lock, folder: Path) -> None:
    """Compare the digest of a file with the pinned one and with the recorded one. Raises DataError, with the remedy."""
    if file.sha256 is not None and digest != file.sha256:
        raise DataError(
            f"{path}: not the published file, its sha256 is {digest[:16]}…, not {file.sha256[:16]}…; remove it, and "
            "run the command again, with another mirror if it comes back"
        )
    locked = lock.files.get(file.path)
    if locked is not None and digest != locked.sha256:
        raise DataError(
            f"{path}: not the file that was downloaded first (sha256 {digest[:16]}…, recorded {locked.sha256[:16]}…); "
            f"remove it to download it again, or remove {folder / LOCK} to accept it"
        )
