"""Resumes a stream from what a tracking server holds of it, on a machine that sees nothing else but the shards."""

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import click

from avcil_dist import storage
from avcil_dist.compose import override_config
from avcil_dist.config.compat import MANIFEST_HASH, result_changes, setting_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.section import ChangeClass
from avcil_dist.config.serialization import flatten
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError, TrackingError
from avcil_dist.streams.artifact import committed_steps, is_committed, load_origin, step_url
from avcil_dist.streams.commit import COMMITTED, read_commit
from avcil_dist.streams.identity import Change, StreamIdentity, read_identity, write_identity
from avcil_dist.streams.stream import stream_url
from avcil_dist.tracking.artifacts import download_step
from avcil_dist.tracking.client import COMMITTED_TAG, STREAM_TAG, FoundStream, find_stream, shown

FORK_SUFFIX = "-fork"


@dataclass(frozen=True)
class Resumption:
    """A stream that is ready to go on after `step`; `config` is what it goes on with."""

    config: Config
    step: int
    record: StreamIdentity


@dataclass(frozen=True)
class ResumeRequest:
    """What the user says of a resumption."""

    words: tuple[str, ...] = ()
    from_step: int | None = None
    fork: bool = False
    force: bool = False


def prepare(uri: str, run: str, wish: ResumeRequest) -> Resumption:
    """Bring the step that a stream goes on from to its folder here, every digest checked.

    Prints what differs from the settings that it was made with. Raises TrackingError for a run that is not there,
    ArtifactError for a damaged step, ConfigError for changes that are not allowed and for a folder in use.
    """
    found = find_stream(uri, run)
    step = _step(found, uri, wish.from_step)
    with tempfile.TemporaryDirectory() as temporary:
        download_step(found.client, uri, found.steps[step], step, temporary)
        origin = load_origin(temporary, step)
        config = _config(origin.config, uri, wish)
        try:
            manifest_hash = load_manifest(config.data.manifest).content_hash
        except DataError as error:
            raise DataError(f"{error}; say where the shards are on this machine: data.manifest=…") from None
        was = flatten(origin.config) | {MANIFEST_HASH: origin.manifest_hash}
        now = flatten(config) | {MANIFEST_HASH: manifest_hash}
        changes = _changes(was, now, step, wish, found)
        record = _record(found, temporary, step, changes, wish)
        _place(temporary, stream_url(config), step, record)
    return Resumption(config, step, record)


def _step(found: FoundStream, uri: str, wanted: int | None) -> int:
    done = sorted(step for step, run in found.steps.items() if COMMITTED_TAG in run.data.tags)
    name = f"{shown(uri)}: run {found.run.info.run_id}"
    if not done:
        raise TrackingError(f"{name}: no step is committed there; begin the stream anew with avcil train")
    if wanted is not None and wanted not in done:
        raise TrackingError(f"{name}: step {wanted} is not committed there; these are: {', '.join(map(str, done))}")
    return done[-1] if wanted is None else wanted


def _config(made_with: Config, uri: str, wish: ResumeRequest) -> Config:
    """The settings to go on with: those of the step, the user's, and this server."""
    config = override_config(made_with, wish.words)
    if wish.fork and config.name == made_with.name:
        config = config.model_copy(update={"name": made_with.name + FORK_SUFFIX})
    if not wish.fork and config.name != made_with.name:
        raise ConfigError(f"name={config.name}: the stream is {made_with.name}; a new name is a new run: say --fork")
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def _changes(
    was: dict[str, Any], now: dict[str, Any], step: int, wish: ResumeRequest, found: FoundStream
) -> tuple[Change, ...]:
    """The changes that count, shown and weighed. Raises ConfigError for the first that is not allowed."""
    for changed in setting_changes(was, now):
        if changed.key != "tracking.uri":
            click.echo(f"  {changed.key}: {changed.before} -> {changed.after}  ({changed.change_class})", err=True)
    counted = [changed for changed in result_changes(was, now) if changed.key != "name"]
    for changed in counted:
        change = f"{changed.key}: {changed.before} -> {changed.after}"
        if wish.force:
            continue
        if changed.change_class is ChangeClass.INCOMPARABLE:
            raise ConfigError(
                f"{change}: the steps before and after would not be comparable; leave it as it was, or say --force, "
                "which the run and its artifacts will tell"
            )
        if not wish.fork:
            raise ConfigError(f"{change}: that is another stream; say --fork for a run of its own")
    later = [other for other, run in found.steps.items() if other > step and COMMITTED_TAG in run.data.tags]
    if counted and later and not wish.fork:
        raise ConfigError(
            f"step {min(later)} is in this run already, made with the settings as they were; say --fork for another run"
        )
    renamed = [changed for changed in result_changes(was, now) if changed.key == "name"]
    return tuple(
        Change(step, changed.key, changed.before, changed.after, forced=wish.force) for changed in [*counted, *renamed]
    )


def _record(
    found: FoundStream, made: str, step: int, changes: tuple[Change, ...], wish: ResumeRequest
) -> StreamIdentity:
    earlier = tuple(Change(**change) for change in read_commit(step_url(made, step)).get("changes", ()))
    record = StreamIdentity(found.run.data.tags[STREAM_TAG], changes=(*earlier, *changes))
    if wish.fork:
        return replace(record.renamed(), origin_run=found.run.info.run_id, origin_step=step)
    return record


def _place(made: str, stream: str, step: int, record: StreamIdentity) -> None:
    """Put the step and the record into the stream's folder. Raises ConfigError where another stream is there."""
    elsewhere = "give output= (or, with --fork, name=) another folder"
    known = read_identity(stream)
    done = committed_steps(stream)
    is_fork = record.origin_run is not None
    if known is not None and is_fork and (known.origin_run, known.origin_step) == (record.origin_run, step):
        record = replace(record, id=known.id)  # the same command again, after it was cut off
    if known is not None and known.id != record.id:
        raise ConfigError(f"{stream}: another stream is there; {elsewhere}")
    if known is None and done:
        raise ConfigError(f"{stream}: steps of a stream are there that no server was told of; {elsewhere}")
    if any(other > step for other in done):
        raise ConfigError(f"{stream}: later steps than {step} are committed there; {elsewhere}")
    try:
        write_identity(stream, record)
        if is_committed(stream, step) and _commit_of(stream, step) == _commit_of(made, step):
            return
        storage.remove_tree(step_url(stream, step))
        for name in (*read_commit(step_url(made, step))["files"], COMMITTED):
            storage.upload(f"{step_url(made, step)}/{name}", storage.join(step_url(stream, step), name))
    except OSError as error:
        raise ConfigError(f"{stream}: cannot be written ({error.strerror}); give output= a folder here") from None


def _commit_of(stream: str, step: int) -> str:
    return storage.sha256_file(storage.join(step_url(stream, step), COMMITTED))
