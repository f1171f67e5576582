"""Snapshots of a step as others find them: their folders, the newest one, and whether a run can continue from it.

Writing and loading them is `training/snapshot.py`.
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import Field, JsonValue

from avcil_dist import storage
from avcil_dist.config.compat import result_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.streams.commit import COMMITTED, Commit, has_commit, read_commit
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import step_url


class SnapshotCommit(Commit):
    """Commit of a snapshot: the settings, ranks and data that it is of."""

    settings: dict[str, JsonValue]
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    manifest_hash: str
    previous_step: str | None


class FoundSnapshot(NamedTuple):
    """A committed snapshot: its folder, the number of iterations done, and its commit."""

    folder: str
    iteration: int
    commit: SnapshotCommit


def snapshots_url(config: Config, step: int) -> str:
    """The folder of a step's snapshots."""
    root = storage.join(config.snapshot.folder, config.stream_name) if config.snapshot.folder else stream_url(config)
    return storage.join(root, "snapshots", f"step_{step:03d}")


def newest_snapshot(config: Config, step: int) -> FoundSnapshot | None:
    """Return the newest committed snapshot of a step, None where there is none. Its files are not verified."""
    for name in reversed(storage.list_folder(snapshots_url(config, step))):
        folder = storage.join(snapshots_url(config, step), name)
        if name.isdecimal() and has_commit(folder):
            try:
                return FoundSnapshot(folder, int(name), read_commit(folder, SnapshotCommit))
            except ArtifactError:  # a run passes over it, too
                continue
    return None


def snapshot_identity(config: Config, step: int, manifest_hash: str) -> dict[str, str | None]:
    """Return the values of a snapshot's commit that must match before it may be resumed."""
    commit = storage.join(step_url(stream_url(config), step - 1), COMMITTED)
    return {
        "manifest_hash": manifest_hash,
        "previous_step": storage.sha256(storage.read_bytes(commit)) if step else None,
    }


def is_of_step(commit: SnapshotCommit, identity: Mapping[str, str | None]) -> bool:
    """Whether a snapshot has this identity; a run passes over one of other data or of another previous step."""
    return all(getattr(commit, key) == value for key, value in identity.items())


def check_snapshot_fits(folder: str, commit: SnapshotCommit, config: Config, step: int) -> None:
    """Raise ConfigError for a snapshot with other settings. The number of ranks and the ZeRO stage may change."""
    for change in result_changes(commit.settings, flatten(config)):
        raise ConfigError(
            f"{folder}: step {step} was begun with {change.key}={change.before}, not {change.after}; "
            "choose another name=, or begin the step anew with --restart-step"
        )
