"""Resumes a stream from its runs on a tracking server, on a machine that has access to the shards and nothing else."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from avcil_dist import storage
from avcil_dist.compose import override_config
from avcil_dist.config.compat import MANIFEST_HASH, result_changes, setting_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.section import ChangeClass
from avcil_dist.config.serialization import flatten
from avcil_dist.data.subset import load_data
from avcil_dist.errors import ArtifactError, ConfigError, DataError, TrackingError
from avcil_dist.streams.commit import COMMITTED, has_commit, read_commit, verify_file
from avcil_dist.streams.identity import Change, StreamIdentity, read_identity, write_identity
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import (
    StepCommit,
    commit_digest,
    committed_steps,
    load_summary,
    recorded_changes,
    step_url,
)
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.artifacts import download_step
from avcil_dist.tracking.client import TrackedStream, find_stream
from avcil_dist.tracking.tags import COMMITTED_TAG, STREAM_TAG

FORK_SUFFIX = "-fork"
# Settings that say where this program writes on the machine that it runs on: there a server has no say.
WRITTEN_PLACES = ("output", "data.shard_cache", "snapshot.folder", "tracking.artifact_uri")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeRequest:
    """Options of `avcil resume`: settings to override, the step to continue after (None: the last committed one)."""

    overrides: tuple[str, ...] = ()
    from_step: int | None = None
    fork: bool = False
    force: bool = False


@dataclass(frozen=True)
class Resumption:
    """A stream whose folder is ready to continue after `step`, with these settings."""

    config: Config
    step: int
    identity: StreamIdentity


def prepare_resume(
    uri: str, run: str, request: ResumeRequest, *, show: Callable[[str], None] = _logger.info
) -> Resumption:
    """Download the step that a stream continues from to its folder here, and verify every file.

    `show` is called with a line for each setting that differs from those of the step. Raises TrackingError for a
    missing run, ArtifactError for a damaged step, ConfigError for changes that the request does not allow and for
    a folder in use.
    """
    tracked = find_stream(uri, run)
    step = _choose_step(tracked, uri, request.from_step)
    with storage.temporary_folder() as folder:
        temporary = str(folder)
        download_step(tracked.client, uri, tracked.steps[step], step, temporary)
        summary = load_summary(temporary, step)
        config = _resumed_config(summary.config, uri, request, show)
        try:
            manifest_hash = load_data(config.data).content_hash
        except DataError as error:
            raise DataError(f"{error}; give the manifest of the shards on this machine: data.manifest=…") from None
        before = flatten(summary.config) | {MANIFEST_HASH: summary.manifest_hash}
        after = flatten(config) | {MANIFEST_HASH: manifest_hash}
        for change in setting_changes(before, after):
            if change.key != "tracking.uri":
                show(f"  {change.key}: {change.before} -> {change.after}  ({change.change_class})")
        changes = allowed_changes(before, after, step, request, _committed_steps(tracked))
        identity = _identity(tracked, temporary, step, changes, request)
        _install(temporary, stream_url(config), step, identity)
    return Resumption(config, step, identity)


def allowed_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], step: int, request: ResumeRequest, committed: Collection[int]
) -> tuple[Change, ...]:
    """Return the changes that affect results, of two flattened configurations.

    `committed`: the committed steps of the run that is resumed after `step`. Raises ConfigError for the first
    change that the request does not allow.
    """
    changes = result_changes(before, after)
    changed = [change for change in changes if change.key != "name"]
    for change in changed if not request.force else ():
        text = f"{change.key}: {change.before} -> {change.after}"
        if change.change_class is ChangeClass.INCOMPARABLE:
            raise ConfigError(
                f"{text}: the steps before and after would not be comparable; keep the old value, or add --force, "
                "which the run and its artifacts record"
            )
        if not request.fork:
            raise ConfigError(f"{text}: that makes another stream; add --fork for a run of its own")
    later = [other for other in committed if other > step]
    if changed and later and not request.fork:
        raise ConfigError(
            f"step {min(later)} is in this run already, made with the old settings; add --fork for another run"
        )
    recorded = [*changed, *(change for change in changes if change.key == "name")]
    return tuple(Change(step, change.key, change.before, change.after, forced=request.force) for change in recorded)


def _committed_steps(tracked: TrackedStream) -> list[int]:
    """The steps that are committed on the server, in order."""
    return sorted(step for step, run in tracked.steps.items() if COMMITTED_TAG in run.data.tags)


def _choose_step(tracked: TrackedStream, uri: str, wanted: int | None) -> int:
    committed = _committed_steps(tracked)
    name = f"{redacted(uri)}: run {tracked.run.info.run_id}"
    if not committed:
        raise TrackingError(f"{name}: no step is committed there; begin the stream anew with avcil train")
    if wanted is not None and wanted not in committed:
        raise TrackingError(
            f"{name}: step {wanted} is not committed there; these are: {', '.join(map(str, committed))}"
        )
    return committed[-1] if wanted is None else wanted


def _resumed_config(made_with: Config, uri: str, request: ResumeRequest, show: Callable[[str], None]) -> Config:
    """The settings of the step with the user's overrides and this server.

    Local folders that the server's settings name for writing are not used: they are of another machine, and would let
    a server choose where files go here. Urls of object storage stay.
    """
    config = override_config(made_with, (*_local_defaults(made_with, request.overrides, show), *request.overrides))
    if request.fork and config.name == made_with.name:
        config = config.model_copy(update={"name": made_with.name + FORK_SUFFIX})
    if not request.fork and config.name != made_with.name:
        raise ConfigError(f"name={config.name}: the stream is {made_with.name}; a new name needs a new run: add --fork")
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def _local_defaults(made_with: Config, overrides: Collection[str], show: Callable[[str], None]) -> list[str]:
    """Overrides that reset the local folders of the step's settings, but those that the user overrides."""
    given = {override.partition("=")[0] for override in overrides}
    defaults = {"output": Config.model_fields["output"].default, "data.shard_cache": "auto"}
    resets = []
    for key in [key for key in WRITTEN_PLACES if key not in given]:
        value, default = flatten(made_with)[key], defaults.get(key, "null")
        if value in (None, "auto", "none", default) or "://" in str(value).removeprefix("file://"):
            continue
        resets.append(f"{key}={default}")
        if key == "output":
            show(f"  output: the files go to {default}, not to {value} of the other machine; output= names a folder")
    return resets


def _identity(
    tracked: TrackedStream, folder: str, step: int, changes: tuple[Change, ...], request: ResumeRequest
) -> StreamIdentity:
    """The identity of the resumed stream: its own, or a new one for a fork."""
    identity = StreamIdentity(tracked.run.data.tags[STREAM_TAG], changes=(*recorded_changes(folder, step), *changes))
    if request.fork:
        return replace(identity.renewed(), origin_run=tracked.run.info.run_id, origin_step=step)
    return identity


def _install(folder: str, stream: str, step: int, identity: StreamIdentity) -> None:
    """Copy the step and the identity into the stream's folder. Raises ConfigError where another stream is there."""
    elsewhere = "give output= (or, with --fork, name=) another folder"
    existing = read_identity(stream)
    committed = committed_steps(stream)
    is_fork = identity.origin_run is not None
    if existing is not None and is_fork and (existing.origin_run, existing.origin_step) == (identity.origin_run, step):
        identity = replace(identity, id=existing.id)  # the same command again, after it was cut off
    if existing is not None and existing.id != identity.id:
        raise ConfigError(f"{stream}: another stream is there; {elsewhere}")
    if existing is None and committed:
        raise ConfigError(f"{stream}: steps of a stream without identity are there; {elsewhere}")
    if any(other > step for other in committed):
        raise ConfigError(f"{stream}: later steps than {step} are committed there; {elsewhere}")
    try:
        write_identity(stream, identity)
        _install_step(folder, stream, step)
    except OSError as error:
        raise ConfigError(f"{stream}: cannot be written ({error.strerror}); give output= a folder here") from None


def _install_step(folder: str, stream: str, step: int) -> None:
    """Copy a verified step, `COMMITTED.json` last. Of an equal commit only missing and damaged files are copied.

    After a kill in between, the next call copies the rest.
    """
    source, target = step_url(folder, step), step_url(stream, step)
    commit = read_commit(source, StepCommit)
    if has_commit(target) and commit_digest(stream, step) != commit_digest(folder, step):
        storage.remove_tree(storage.join(target, COMMITTED))  # first: without it the rest does not count
        storage.remove_tree(target)
    for name in commit.files:
        try:
            verify_file(target, name, commit)
        except ArtifactError:
            storage.upload(f"{source}/{name}", storage.join(target, name))
    if not has_commit(target):
        storage.upload(f"{source}/{COMMITTED}", storage.join(target, COMMITTED))
