"""A stream and its runs in MLflow: what is told to the spool, and who sends it when.

Nothing here waits for a server while a step trains. At the end of a step, and of a stream, what
is left is sent within `tracking.wait_seconds`; what a server that is away was not told stays in
the spool for the next start, or for `avcil sync`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

import click

from avcil_dist.config.schema import Config, TrackingConfig
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import TrackingError
from avcil_dist.streams.artifact import committed_steps
from avcil_dist.streams.identity import StreamIdentity, new_identity, read_identity, write_identity
from avcil_dist.streams.stream import stream_url
from avcil_dist.tracking.client import CHANGES_TAG, ORIGIN_RUN_TAG, ORIGIN_STEP_TAG, shown, tracking_uri, with_uri
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.events import STREAM, StepTracker, end_status, unended_steps
from avcil_dist.tracking.sender import EventWriter, Sender

SYNC_SECONDS = 60.0  # without any movement: a server may be slow, and who syncs has time
INTERRUPTED_SECONDS = 5.0  # who pressed Ctrl-C, or has an error to read, waits no longer


def open_run(config: Config) -> str:
    """ResumePolicy, or begin again, to tell of a stream; returns its id, by which its run is found on any server.

    Waits for no server. Raises ConfigError for a tracking.uri that cannot be.
    """
    tracking_uri(config.tracking, config.output)
    stream = stream_url(config)
    record = read_identity(stream)
    if record is None:
        record = new_identity()
        write_identity(stream, record)
    spool = _spool(stream, record.id)
    spool.append(
        "open",
        name=config.stream_name,
        parameters=flatten(config),
        tags={"avcil.method": config.method.name, "avcil.stream": stream} | _history(record),
        tracking=config.tracking.model_dump(mode="json"),
        output=config.output,
    )
    told = {told["step"] for told in spool.records("artifact")}
    for step in committed_steps(stream):
        if step not in told:  # a start that was cut off between commit and record, or a spool of another machine
            with StepTracker(spool, step) as tracker:
                tracker.publish(stream)
    return record.id


@contextmanager
def stream_run(config: Config, *, is_main: bool) -> Iterator[str | None]:
    """The id of the stream, for the main process alone; its run ends as the block ends."""
    if not is_main:
        yield None
        return
    stream_id = open_run(config)
    kind: type[BaseException] | None = None
    try:
        yield stream_id
    except BaseException as error:
        kind = type(error)
        raise
    finally:
        close_run(config, kind)


def close_run(config: Config, kind: type[BaseException] | None) -> None:
    """Say how the stream ended (None: well), and send what is left."""
    status = end_status(kind)
    with _sending(config, hurried=kind is not None) as spool:
        if status in ("FAILED", "KILLED"):
            for run in unended_steps(spool):  # of a rank that was killed, or ended for another's error
                spool.append("end", run=run, status=status)
        if status != "RUNNING":
            spool.append("end", run=STREAM, status=status)


@contextmanager
def track_step(config: Config, step: int) -> Iterator[StepTracker]:
    """The step's own run; what is told of it is sent while the block runs, and what is left as it ends."""
    with _sending(config) as spool, StepTracker(spool, step) as tracker:
        yield tracker


def publish_step(config: Config, tracker: StepTracker, num_steps: int) -> None:
    """Tell of a committed step; the last one's weights are the stream's final model, and end the stream's run."""
    tracker.publish(stream_url(config))
    if tracker.step + 1 == num_steps:
        name = config.tracking.register_as
        if name != "none":
            tracker.register(f"{config.name}-{config.method.name}" if name == "auto" else name)
        tracker.spool.append("end", run=STREAM, status="FINISHED")


def unsent(stream: str) -> str | None:
    """Why not everything of a stream has been told to its server, or None when it has."""
    told = _told_of(stream)
    if told is None:
        return None
    uri = tracking_uri(told.tracking, told.output)
    return None if told.spool.is_sent(uri) else told.spool.note(uri).reason or "it was not asked yet"


def sync_stream(stream: str, *, uri: str | None, again: bool) -> str:
    """Tell a server what it has not been told of a stream; returns the server.

    `uri`: another than the stream's own. `again`: from the beginning; what is there is not doubled. Raises
    TrackingError when the server stays away, or where there is nothing of a stream.
    """
    stream = stream.rstrip("/")
    told = _told_of(stream)
    if told is None:
        raise TrackingError(f"{stream}: nothing was told of a stream here; give the folder that `avcil train` printed")
    tracking = with_uri(told.tracking, uri) if uri else told.tracking
    spool, where = told.spool, tracking_uri(tracking, told.output)
    if again:
        with spool.sending_lock(where):
            note = spool.note(where)
            note.offset = 0
            spool.save_note(where, note)
    sender = _sender(spool, tracking, told.output, stream, told.id)
    sender.start()
    if not sender.close(max(tracking.wait_seconds, SYNC_SECONDS)):
        raise TrackingError(
            f"{shown(where)}: still away ({spool.note(where).reason or 'no answer'}); start the server, "
            f"then run avcil sync {stream} again; what it is to be told is kept in {spool.path}"
        )
    return where


class _Told(NamedTuple):
    """What a stream's spool says of itself: the stream's id, and the settings of its last start."""

    id: str
    spool: EventQueue
    tracking: TrackingConfig
    output: str


def _told_of(stream: str) -> _Told | None:
    """None where nothing of a stream was ever to be told."""
    record = read_identity(stream)
    if record is None:
        return None
    spool = _spool(stream, record.id)
    opened = spool.records("open")
    if not opened:
        return None
    return _Told(record.id, spool, TrackingConfig.model_validate(opened[-1]["tracking"]), opened[-1]["output"])


@contextmanager
def _sending(config: Config, *, hurried: bool = False) -> Iterator[EventQueue]:
    """The stream's spool; a sender works while the block runs, and a while after it, less where one is `hurried`."""
    stream = stream_url(config)
    record = read_identity(stream)
    assert record is not None, "open_run comes first"
    spool = _spool(stream, record.id)
    sender = _sender(spool, config.tracking, config.output, stream, record.id)
    sender.start()
    try:
        yield spool
    except BaseException:
        hurried = True
        raise
    finally:
        patience = config.tracking.wait_seconds
        if not sender.close(min(patience, INTERRUPTED_SECONDS) if hurried else patience):
            uri = tracking_uri(config.tracking, config.output)
            click.echo(
                f"{shown(uri)}: not all is uploaded ({spool.note(uri).reason or 'no answer yet'}); nothing is "
                f"lost: {stream} holds it; once the server answers, finish with: avcil sync {stream}",
                err=True,
            )


def _sender(spool: EventQueue, tracking: TrackingConfig, output: str, stream: str, stream_id: str) -> Sender:
    uri = tracking_uri(tracking, output)

    def connect(runs: dict[str, str]) -> EventWriter:
        from avcil_dist.tracking.mlflow_writer import MlflowWriter

        return MlflowWriter(uri, tracking, output=output, stream=stream, stream_id=stream_id, runs=runs)

    return Sender(spool, uri, connect, shown=shown(uri))


def _spool(stream: str, stream_id: str) -> EventQueue:
    return EventQueue(queue_folder(stream, stream_id))


def _history(record: StreamIdentity) -> dict[str, str]:
    """Tags that say where a stream came from, and what was changed on the way."""
    tags: dict[str, str] = {}
    if record.origin_run is not None:
        tags |= {ORIGIN_RUN_TAG: record.origin_run, ORIGIN_STEP_TAG: str(record.origin_step)}
    if record.changes:
        tags[CHANGES_TAG] = json.dumps([asdict(change) for change in record.changes])
    return tags
