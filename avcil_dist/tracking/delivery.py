"""Delivery of a stream's tracking events: by the process that trains, while it trains, or later by `avcil sync`.

Training never waits for a server. At the end of a step, and of a stream, unsent events are sent for at most
`tracking.wait_seconds`; what remains stays in the event queue for the next start, or for `avcil sync`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pydantic import ValidationError

from avcil_dist import storage
from avcil_dist.config.schema import Config, TrackingConfig
from avcil_dist.errors import ArtifactError, ConfigError, TrackingError
from avcil_dist.streams.identity import read_identity
from avcil_dist.streams.stream import stream_url
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.outcomes import RefusedError
from avcil_dist.tracking.sender import EventWriter, Sender
from avcil_dist.tracking.trackers import tracker_class, tracker_folder
from avcil_dist.tracking.trackers.base import StreamName
from avcil_dist.tracking.uris import is_sqlite, tracking_uri, with_uri

SYNC_SECONDS = 60.0  # without progress; longer than the end of a step waits, because the user waits for nothing else
INTERRUPTED_SECONDS = 5.0  # after an error or Ctrl-C

Warn = Callable[[str], None]


class LastOpen(NamedTuple):
    """The last start of a stream: its id, its queue, its tracking settings, and the server it was sent to.

    `is_elsewhere`: jobs on other machines train it. `experiment`: of the first start; None where it has no name.
    """

    id: str
    queue: EventQueue
    tracking: TrackingConfig
    output: str
    server: str | None
    is_elsewhere: bool = False
    experiment: str | None = None

    @property
    def uri(self) -> str:
        """The server or database that has this stream now."""
        return tracking_uri(self.tracking, self.output, earlier=self.server)

    @property
    def keeps_events(self) -> bool:
        """Whether `avcil sync` alone sends: several machines must not write to one sqlite file."""
        return self.is_elsewhere and is_sqlite(self.uri)


def last_open(stream: str) -> LastOpen | None:
    """Return the last start of a stream; None where it was never opened for tracking."""
    identity = read_identity(stream)
    if identity is None:
        return None
    queue = EventQueue(queue_folder(stream, identity.id))
    events = [event for event in queue.events("open") if "tracking" in event and "output" in event]
    if not events:
        return None
    last = events[-1]
    try:
        tracking = TrackingConfig.model_validate(last["tracking"])
    except ValidationError as error:
        raise TrackingError(
            f"{queue.path}: the tracking settings of its last start are damaged ({error.errors()[0]['msg']}); "
            "train again, or begin the stream anew with --restart"
        ) from None
    is_elsewhere = last.get("is_elsewhere", False)
    experiment = events[0]["tracking"].get("experiment")
    return LastOpen(identity.id, queue, tracking, last["output"], last.get("server"), is_elsewhere, experiment)


def unsent(stream: str) -> str | None:
    """The reason why a stream has unsent events, or None when its server and its other trackers have them all."""
    opened = last_open(stream)
    if opened is None:
        return None
    for sender in _senders(opened, stream):
        if not opened.queue.is_sent(sender.uri):
            is_kept = opened.keeps_events and sender.uri == opened.uri
            kept = "jobs write to no SQLite database" if is_kept else "no attempt was made yet"
            return opened.queue.cursor(sender.uri).reason or kept
    return None


class Sync(NamedTuple):
    """The end of a synchronisation: the server or tracker, and the number of events that it refused so far."""

    server: str
    rejected: int


def sync_stream(stream: str, *, uri: str | None, again: bool) -> list[Sync]:
    """Send the unsent events of a stream to its server and its other trackers, or to `uri` alone.

    `again`: send all events from the first; the server keeps what it has. Raises TrackingError when the server
    stays unavailable or refuses the stream, and for a folder without events.
    """
    stream = stream.rstrip("/")
    opened = last_open(stream)
    if opened is None:
        raise TrackingError(f"{stream}: no tracking events here; give the stream folder that `avcil train` printed")
    if uri:
        opened = opened._replace(tracking=with_uri(opened.tracking, uri))
    senders = _senders(opened, stream)[: 1 if uri else None]
    return [_sync(sender, stream, max(opened.tracking.wait_seconds, SYNC_SECONDS), again=again) for sender in senders]


def _sync(sender: Sender, stream: str, patience: float, *, again: bool) -> Sync:
    queue = sender.queue
    if again:
        with queue.sender_lock(sender.uri):
            cursor = queue.cursor(sender.uri)
            cursor.offset = cursor.rejected = 0
            queue.save_cursor(sender.uri, cursor)
    sender.start()
    if not sender.close(patience):
        reason = queue.cursor(sender.uri).reason or "no answer"
        cause = sender.refusal or f"still unavailable ({reason}); start the server"
        raise TrackingError(
            f"{sender.shown}: {cause}; then run avcil sync {stream} again; the unsent events are kept in {queue.path}"
        )
    return Sync(sender.shown, queue.cursor(sender.uri).rejected)


@contextmanager
def sending(config: Config, warn: Warn, *, hurried: bool = False, is_last: bool = False) -> Iterator[EventQueue]:
    """Run senders for the stream's queue during the block and a bounded time after it, less if `hurried`.

    A server that refuses the stream is reported by the sender, and again only where `is_last`. A database that
    `avcil sync` alone writes to has no sender.
    """
    stream = stream_url(config)
    opened = last_open(stream)
    identity = read_identity(stream)
    if identity is None:
        raise ArtifactError(f"{stream}: its folder was removed meanwhile; run the same command again")
    if opened is None:  # the disk was full when the stream was opened
        queue = EventQueue(queue_folder(stream, identity.id))
        opened = LastOpen(identity.id, queue, config.tracking, config.output, None)
    opened = opened._replace(tracking=config.tracking, output=config.output)
    senders = _senders(opened, stream)[1 if opened.keeps_events else 0 :]
    for sender in senders:
        sender.start()
    try:
        yield opened.queue
    except BaseException:
        hurried = True
        raise
    finally:
        if num_lost := opened.queue.flush():
            warn(f"{opened.queue.path}: cannot be written; {num_lost} tracking events are lost; make room on the disk")
        patience = min(config.tracking.wait_seconds, INTERRUPTED_SECONDS) if hurried else config.tracking.wait_seconds
        for sender in senders:
            if not sender.close(patience) and (is_last or not sender.refusal):
                warn(_unsent_line(sender, stream))


def _unsent_line(sender: Sender, stream: str) -> str:
    reason = sender.queue.cursor(sender.uri).reason or "no answer yet"
    cause = sender.refusal or f"not all is uploaded ({reason})"
    when = "then" if sender.refusal else "once the server answers,"
    return f"{sender.shown}: {cause}; nothing is lost, the events are kept in {stream}; {when} run: avcil sync {stream}"


def _senders(opened: LastOpen, stream: str) -> list[Sender]:
    """Return the sender to the server or database, and then those to the other trackers."""
    names = dict.fromkeys(opened.tracking.trackers)
    return [_server_sender(opened, stream), *(_tracker_sender(opened, stream, name) for name in names)]


def _tracker_sender(opened: LastOpen, stream: str, name: str) -> Sender:
    local = storage.local_path(stream)
    folder = tracker_folder(opened.queue.folder if local is None else Path(local), name)
    names = StreamName(PurePosixPath(stream).name, opened.id, opened.experiment or opened.tracking.experiment)

    def connect(runs: dict[str, str]) -> EventWriter:
        try:
            return tracker_class(name)(folder, names, runs)
        except ConfigError as error:
            raise RefusedError(str(error)) from None

    return Sender(opened.queue, f"tracker:{name}", connect, shown=f"{name} ({folder})")


def _server_sender(opened: LastOpen, stream: str) -> Sender:
    uri = opened.uri

    def connect(runs: dict[str, str]) -> EventWriter:
        from avcil_dist.tracking.mlflow_writer import MlflowWriter

        return MlflowWriter(uri, opened.tracking, output=opened.output, stream=stream, stream_id=opened.id, runs=runs)

    return Sender(opened.queue, uri, connect, shown=redacted(uri))
