"""Published weights of the encoders on the hub, and their local copies.

A name is `owner/name` or `owner/name@REVISION`. Without a revision it is the one pinned here, or `main`: the newest
commit at the first download, and from then on the local copy. A local copy needs no network.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.storage.hub import HubRevision, cache_folder, download_snapshot, hub_revision, local_snapshot

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
DESCRIPTION = "config.json"
NAME = re.compile(r"(?P<repository>[\w-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?")
NEWEST = "main"


@dataclass(frozen=True)
class Published:
    """Weights on the hub: repository, pinned commit, digest of `model.safetensors`; None where it is unknown."""

    repository: str
    revision: str | None = None
    sha256: str | None = None


PUBLISHED = {
    "videomae": Published(
        "MCG-NJU/videomae-base",
        "dc740ceda42fce44faed2ea03c6d447db72f6af9",
        "bc053ca2840a038b1068269a4eec06ca569689e9a1ed9376a5b2b8a111be5290",
    ),
    "audiomae": Published("gaunernst/vit_base_patch16_1024_128.audiomae_as2m"),  # no commit of it is known for certain
}


@dataclass(frozen=True)
class LocalWeights:
    """A local copy of published weights: the file, its repository, revision, commit and sha256."""

    path: Path
    repository: str
    revision: str
    commit: str
    sha256: str


def is_hub_name(name: str) -> bool:
    """Whether weights of this name are on the hub."""
    return NAME.fullmatch(name) is not None and not name.endswith((".safetensors", ".pth", ".bin"))


def split_name(name: str) -> tuple[str, str]:
    """Return repository and revision of `owner/name@REVISION`. Raises ConfigError for another form."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name}: not a name on the hub; give owner/name, or owner/name@REVISION")
    pinned = next((known.revision for known in PUBLISHED.values() if known.repository == match["repository"]), None)
    return match["repository"], match["revision"] or pinned or NEWEST


def local_folder(name: str) -> Path | None:
    """Return the folder of the local copy of `name`; None where there is none. No network."""
    repository, revision = split_name(name)
    for file in WEIGHT_FILES:
        folder = local_snapshot(repository, revision, [DESCRIPTION, file])
        if folder is not None and (folder / file).exists():
            return folder
    return None


def weights_on_hub(name: str) -> tuple[HubRevision, str]:
    """Return the repository of `name` at its commit, and the name of its file. Raises StorageError or DataError."""
    repository, revision = split_name(name)
    found = hub_revision(repository, "model", revision)
    for file in WEIGHT_FILES:
        if file in found.files:
            return found, file
    raise DataError(f"{repository} ({found.commit[:12]}): has neither {' nor '.join(WEIGHT_FILES)}")


def download_weights(name: str) -> Path:
    """Return the folder of the local copy of `name`, downloaded where there is none.

    Raises StorageError or DataError.
    """
    folder = local_folder(name)
    if folder is not None:
        return folder
    _, file = weights_on_hub(name)
    repository, revision = split_name(name)
    return download_snapshot(repository, revision, [DESCRIPTION, file])


def get_weights(name: str) -> LocalWeights:
    """Download weights and verify them. Raises StorageError or DataError as `check_published` does."""
    repository, revision = split_name(name)
    folder = download_weights(name)
    path = next(folder / file for file in WEIGHT_FILES if (folder / file).exists())
    digest = storage.sha256_file(str(path.resolve()))
    check_published(name, path, digest)
    return LocalWeights(path, repository, revision, folder.name, digest)


def check_published(name: str, path: Path, digest: str) -> None:
    """Compare the digest of a file with the pinned one. Raises DataError."""
    repository, revision = split_name(name)
    for known in PUBLISHED.values():
        is_pinned = known.repository == repository and known.revision == revision and path.name == WEIGHT_FILES[0]
        if is_pinned and known.sha256 not in (None, digest):
            raise DataError(
                f"{name}: {path}: not the published weights, its sha256 is {digest[:16]}…; remove "
                f"{cache_folder()}/models--{repository.replace('/', '--')} to download it again"
            )
