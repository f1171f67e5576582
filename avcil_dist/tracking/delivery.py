"""Delivery of a stream's tracking events: by the process that trains, while it trains, or later by `avcil sync`.

Training never waits for a server. At the end of a step, and of a stream, unsent events are sent for at most
`tracking.wait_seconds`; what remains stays in the event queue for the next start, or for `avcil sync`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pydantic import ValidationError

from avcil_dist.config.schema import Config, TrackingConfig
from avcil_dist.errors import ArtifactError, TrackingError
from avcil_dist.streams.identity import read_identity
from avcil_dist.streams.stream import stream_url
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.event_queue import EventQueue, queue_folder
from avcil_dist.tracking.sender import EventWriter, Sender
from avcil_dist.tracking.uris import is_sqlite, tracking_uri, with_uri

SYNC_SECONDS = 60.0  # without progress; longer than the end of a step waits, because the user waits for nothing else
INTERRUPTED_SECONDS = 5.0  # after an error or Ctrl-C

Warn = Callable[[str], None]


class LastOpen(NamedTuple):
    """The last start of a stream: its id, its queue, its tracking settings, and the server it was sent to.

    `is_elsewhere`: jobs on other machines train it.
    """

    id: str
    queue: EventQueue
    tracking: TrackingConfig
    output: str
    server: str | None
    is_elsewhere: bool = False

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
    return LastOpen(identity.id, queue, tracking, last["output"], last.get("server"), is_elsewhere)


def unsent(stream: str) -> str | None:
    """The reason why a stream has unsent events, or None when its server has them all."""
    opened = last_open(stream)
    if opened is None:
        return None
    uri = opened.uri
    if opened.queue.is_sent(uri):
        return None
    kept = "jobs write to no SQLite database" if opened.keeps_events else "no attempt was made yet"
    return opened.queue.cursor(uri).reason or kept


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
    opened = last_open(stream)
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


@contextmanager
def sending(config: Config, warn: Warn, *, hurried: bool = False, is_last: bool = False) -> Iterator[EventQueue]:
    """Run a sender for the stream's queue during the block and a bounded time after it, less if `hurried`.

    A server that refuses the stream is reported by the sender, and again only where `is_last`. Where `avcil sync`
    alone sends, the queue is filled and nothing else.
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
    senders = [] if opened.keeps_events else [_sender(opened, stream)]
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


def _sender(opened: LastOpen, stream: str) -> Sender:
    uri = opened.uri

    def connect(runs: dict[str, str]) -> EventWriter:
        from avcil_dist.tracking.mlflow_writer import MlflowWriter

        return MlflowWriter(uri, opened.tracking, output=opened.output, stream=stream, stream_id=opened.id, runs=runs)

    return Sender(opened.queue, uri, connect, shown=redacted(uri))
