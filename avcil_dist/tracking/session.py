"""Tracking session of a stream: opens and ends its runs, sends events while a step trains, syncs later.

Training never waits for a server. At the end of a step, and of a stream, unsent events are sent for at most
`tracking.wait_seconds`; what remains stays in the event queue for the next start, or for `avcil sync`.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

from pydantic import ValidationError

from avcil_dist.config.schema import Config, TrackingConfig
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import ArtifactError, TrackingError
from avcil_dist.streams.identity import StreamIdentity, new_identity, read_identity, write_identity
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import committed_steps
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.events import STREAM, StepDescription, StepTracker, end_status, unfinished_steps
from avcil_dist.tracking.run_facts import stream_facts
from avcil_dist.tracking.sender import EventWriter, Sender
from avcil_dist.tracking.tags import CHANGES_TAG, FOLDER_TAG, ORIGIN_RUN_TAG, ORIGIN_STEP_TAG
from avcil_dist.tracking.uris import tracking_uri, with_uri

SYNC_SECONDS = 60.0  # without progress; longer than the end of a step waits, because the user waits for nothing else
INTERRUPTED_SECONDS = 5.0  # after an error or Ctrl-C

Warn = Callable[[str], None]
_logger = logging.getLogger(__name__)


def open_run(config: Config) -> str:
    """Open the stream's run, or reopen it, and return the stream's id, which identifies the run on any server.

    Only appends events; no server is contacted. Raises ConfigError for an invalid tracking.uri.
    """
    stream = stream_url(config)
    opened = _last_open(stream)
    server = tracking_uri(config.tracking, config.output, earlier=opened.server if opened else None)
    identity = read_identity(stream)
    if identity is None:
        identity = new_identity()
        write_identity(stream, identity)
    queue = _queue(stream, identity.id)
    queue.append(
        "open",
        name=config.stream_name,
        parameters=flatten(config),
        tags=stream_facts(config) | {FOLDER_TAG: stream} | _history_tags(identity),
        tracking=config.tracking.model_dump(mode="json"),
        output=config.output,
        server=server,
    )
    published = {event["step"] for event in queue.events("artifact")}
    for step in committed_steps(stream):
        if step not in published:  # its process ended between commit and event, or ran on another machine
            with StepTracker(queue, step, _description(config, step)) as tracker:
                tracker.publish(stream, config.data.manifest)
    return identity.id


def check_tracking(config: Config) -> None:
    """Check what `open_run` needs, before anything is made. Raises ConfigError and TrackingError as it does."""
    opened = _last_open(stream_url(config))
    tracking_uri(config.tracking, config.output, earlier=opened.server if opened else None)


@contextmanager
def stream_run(config: Config, *, is_main: bool, warn: Warn = _logger.warning) -> Iterator[str | None]:
    """The run of a stream as a context: yields the stream's id on the main process, None on others.

    `warn` is called with a line of text when events are still unsent at the end.
    """
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
        close_run(config, kind, warn=warn)


def close_run(config: Config, kind: type[BaseException] | None, *, warn: Warn = _logger.warning) -> None:
    """End the stream's run after an exception of type `kind` (None: without one), and send unsent events."""
    status = end_status(kind)
    with _sending(config, warn, hurried=kind is not None, is_last=True) as queue:
        if status in ("FAILED", "KILLED"):
            for run in unfinished_steps(queue):  # of a rank that was killed, or stopped by another rank's error
                queue.append("end", run=run, status=status)
        if status != "RUNNING":
            queue.append("end", run=STREAM, status=status)


@contextmanager
def track_step(
    config: Config, step: int, *, facts: Mapping[str, str] | None = None, warn: Warn = _logger.warning
) -> Iterator[StepTracker]:
    """The run of a step as a context. Its events are sent while the block runs, the rest at its end.

    `facts` are tags about the machines of the step.
    """
    with _sending(config, warn) as queue, StepTracker(queue, step, _description(config, step, facts)) as tracker:
        yield tracker


def publish_step(config: Config, tracker: StepTracker, num_steps: int, page: str | None = None) -> None:
    """Publish a committed step. The last step also registers its weights and ends the stream's run.

    `page`: the name of a report in the stream's folder.
    """
    tracker.publish(stream_url(config), config.data.manifest)
    if tracker.step + 1 == num_steps:
        name = config.tracking.register_as
        if name != "none":
            tracker.register(f"{config.name}-{config.method.label}" if name == "auto" else name)
        if page is not None:
            tracker.queue.append("file", file=page)  # after the rest: `is_published` looks for it
        tracker.queue.append("end", run=STREAM, status="FINISHED")


def is_published(config: Config, page: str) -> bool:
    """Whether `publish_step` was called with this page, and was not killed on the way."""
    opened = _last_open(stream_url(config))
    return opened is not None and page in {event["file"] for event in opened.queue.events("file")}


def _description(config: Config, step: int, facts: Mapping[str, str] | None = None) -> StepDescription:
    tags = stream_facts(config) | {"step": str(step)}
    name = f"{config.stream_name}-step{step:03d}"
    return StepDescription(name, flatten(config), tags, dict(facts or {}))


def unsent(stream: str) -> str | None:
    """The reason why a stream has unsent events, or None when its server has them all."""
    opened = _last_open(stream)
    if opened is None:
        return None
    uri = opened.uri
    return None if opened.queue.is_sent(uri) else opened.queue.cursor(uri).reason or "no attempt was made yet"


class Sync(NamedTuple):
    """The end of a synchronisation: the uri of the server, and the number of events that it refused so far."""

    server: str
    rejected: int


def sync_stream(stream: str, *, uri: str | None, again: bool) -> Sync:
    """Send the unsent events of a stream to its server, or to `uri`.

    `again`: send all events from the first; the server keeps what it has. Raises TrackingError when the server
    stays unavailable or refuses the stream, and for a folder without events.
    """
    stream = stream.rstrip("/")
    opened = _last_open(stream)
    if opened is None:
        raise TrackingError(f"{stream}: no tracking events here; give the stream folder that `avcil train` printed")
    if uri:
        opened = opened._replace(tracking=with_uri(opened.tracking, uri))
    queue, server = opened.queue, opened.uri
    if again:
        with queue.sender_lock(server):
            cursor = queue.cursor(server)
            cursor.offset = cursor.rejected = 0
            queue.save_cursor(server, cursor)
    sender = _sender(opened, stream)
    sender.start()
    if not sender.close(max(opened.tracking.wait_seconds, SYNC_SECONDS)):
        cause = sender.refusal or f"still unavailable ({queue.cursor(server).reason or 'no answer'}); start the server"
        raise TrackingError(
            f"{redacted(server)}: {cause}; then run avcil sync {stream} again; the unsent events are kept in "
            f"{queue.path}"
        )
    return Sync(server, queue.cursor(server).rejected)


class _LastOpen(NamedTuple):
    """The last start of a stream: its id, its queue, its tracking settings, and the server it was sent to."""

    id: str
    queue: EventQueue
    tracking: TrackingConfig
    output: str
    server: str | None

    @property
    def uri(self) -> str:
        """The server or database that has this stream now."""
        return tracking_uri(self.tracking, self.output, earlier=self.server)


def _last_open(stream: str) -> _LastOpen | None:
    """None where the stream was never opened for tracking."""
    identity = read_identity(stream)
    if identity is None:
        return None
    queue = _queue(stream, identity.id)
    events = [event for event in queue.events("open") if "tracking" in event and "output" in event]
    if not events:
        return None
    try:
        tracking = TrackingConfig.model_validate(events[-1]["tracking"])
    except ValidationError as error:
        raise TrackingError(
            f"{queue.path}: the tracking settings of its last start are damaged ({error.errors()[0]['msg']}); "
            "train again, or begin the stream anew with --restart"
        ) from None
    return _LastOpen(identity.id, queue, tracking, events[-1]["output"], events[-1].get("server"))


@contextmanager
def _sending(config: Config, warn: Warn, *, hurried: bool = False, is_last: bool = False) -> Iterator[EventQueue]:
    """Run a sender for the stream's queue during the block and a bounded time after it, less if `hurried`.

    A server that refuses the stream is reported by the sender, and again only where `is_last`.
    """
    stream = stream_url(config)
    opened = _last_open(stream)
    identity = read_identity(stream)
    if identity is None:
        raise ArtifactError(f"{stream}: its folder was removed meanwhile; run the same command again")
    if opened is None:  # the disk was full when the stream was opened
        opened = _LastOpen(identity.id, _queue(stream, identity.id), config.tracking, config.output, None)
    opened = opened._replace(tracking=config.tracking, output=config.output)
    queue, uri = opened.queue, opened.uri
    sender = _sender(opened, stream)
    sender.start()
    try:
        yield queue
    except BaseException:
        hurried = True
        raise
    finally:
        if num_lost := queue.flush():
            warn(f"{queue.path}: cannot be written; {num_lost} tracking events are lost; make room on the disk")
        patience = config.tracking.wait_seconds
        is_sent = sender.close(min(patience, INTERRUPTED_SECONDS) if hurried else patience)
        if not is_sent and (is_last or not sender.refusal):
            cause = sender.refusal or f"not all is uploaded ({queue.cursor(uri).reason or 'no answer yet'})"
            when = "then" if sender.refusal else "once the server answers,"
            warn(
                f"{redacted(uri)}: {cause}; nothing is lost, the events are kept in {stream}; {when} run: avcil sync "
                f"{stream}"
            )


def _sender(opened: _LastOpen, stream: str) -> Sender:
    uri = opened.uri

    def connect(runs: dict[str, str]) -> EventWriter:
        from avcil_dist.tracking.mlflow_writer import MlflowWriter

        return MlflowWriter(uri, opened.tracking, output=opened.output, stream=stream, stream_id=opened.id, runs=runs)

    return Sender(opened.queue, uri, connect, shown=redacted(uri))


def _queue(stream: str, stream_id: str) -> EventQueue:
    return EventQueue(queue_folder(stream, stream_id))


def _history_tags(identity: StreamIdentity) -> dict[str, str]:
    """Tags for the origin of a fork and for changed settings."""
    tags: dict[str, str] = {}
    if identity.origin_run is not None:
        tags |= {ORIGIN_RUN_TAG: identity.origin_run, ORIGIN_STEP_TAG: str(identity.origin_step)}
    if identity.changes:
        tags[CHANGES_TAG] = json.dumps([asdict(change) for change in identity.changes])
    return tags
