"""Thread that sends the events of a queue to one tracking server, beside the training, which never waits for it.

Events go in order. One process at a time sends to a server. A failed call is retried, with jitter; events
that are still unsent when the process ends are sent by the next sender.
"""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from filelock import Timeout

from avcil_dist.errors import StorageError
from avcil_dist.tracking import environment
from avcil_dist.tracking.event_queue import DeliveryCursor, Event, EventQueue
from avcil_dist.tracking.outcomes import RefusedError, RejectedError, RunDeletedError, UnavailableError

EVENTS_PER_BATCH = 200
POLL_SECONDS = 1.0
PACE_SECONDS = (
    1.0  # between two batches while training runs: a call costs a processor as much for one event as for many
)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 10.0
LONGEST_WAIT_AT_THE_END = 1.0
JOIN_SECONDS = 2.0

_logger = logging.getLogger(__name__)


class EventWriter(Protocol):
    """Connection to one server. `runs`: ids of the stream's runs there; `is_uploading`: a file is being uploaded."""

    runs: dict[str, str]
    is_uploading: bool

    @property
    def experiment(self) -> str | None:
        """The id of the experiment of the runs; None on a server without experiments."""

    def write(self, events: Sequence[Event]) -> None:
        """Write events of one kind to the server, without duplicating what it has.

        Raises UnavailableError, RejectedError, RefusedError or RunDeletedError.
        """


class Sender:
    """Sends to one server: `start` begins, `close` ends within a bounded time.

    `refusal`: why the server takes nothing of this stream, which ends the thread; None while it may take events.
    """

    def __init__(
        self, queue: EventQueue, uri: str, connect: Callable[[dict[str, str]], EventWriter], *, shown: str
    ) -> None:
        self.queue, self.uri, self.connect, self.shown = queue, uri, connect, shown
        self.refusal: str | None = None
        self._wake, self._hurry, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._failures = 0  # a count, so that `close` sees whether another try was made
        self._is_saved = True
        self._writer: EventWriter | None = None
        self._thread = threading.Thread(target=self._run, name="tracking sender", daemon=True)
        queue.on_append.append(self._wake.set)

    def start(self) -> None:
        """Start the thread. It must not change the environment, which other threads read: that is done before."""
        environment.isolate()
        self._thread.start()

    def close(self, patience: float) -> bool:
        """Send what is left and end the thread. Returns whether everything is sent.

        Gives up when the server has been unavailable for `patience` seconds, time before the call included, or
        when the cursor has not moved for as long. A running upload is waited for: its time is bounded by its size.
        """
        failures, moved_at, offset = self._failures, time.monotonic(), -1
        self._hurry.set()
        self._wake.set()
        while not self.queue.is_sent(self.uri) and self._thread.is_alive():
            cursor = self.queue.cursor(self.uri)
            if cursor.offset != offset:
                offset, moved_at = cursor.offset, time.monotonic()
            tried, since = self._failures > failures, cursor.unavailable_since
            if tried and since is not None and time.time() - since >= patience:
                break
            uploads = self._writer is not None and self._writer.is_uploading
            if not uploads and time.monotonic() - moved_at >= patience:
                break
            self._stop.wait(0.05)
        self._stop.set()
        self._wake.set()
        self._thread.join(JOIN_SECONDS)  # a thread that hangs in a call is left: the cursor has its position
        self.queue.on_append.remove(self._wake.set)
        return self.queue.is_sent(self.uri)

    def _run(self) -> None:
        while not self._stop.is_set() and self.refusal is None:
            try:
                lock = self.queue.sender_lock(self.uri)
                lock.acquire(blocking=False)
            except (Timeout, OSError):  # another process sends, or the disk takes no lock now
                self._stop.wait(POLL_SECONDS / 4)
                continue
            try:
                self._send_all()
            except BaseException:  # a bug: loud in the log, and `close` need not wait
                self.refusal = "the sender failed; its traceback is in the log"
                raise
            finally:
                lock.release()

    def _send_all(self) -> None:
        cursor, waits = self.queue.cursor(self.uri), 0
        while not self._stop.is_set():
            batch = list(self.queue.read(cursor.offset, limit=EVENTS_PER_BATCH))
            if not batch:
                self._wake.wait(POLL_SECONDS)
                self._wake.clear()
                continue
            try:
                self._send(batch, cursor)
                waits = 0
                if len(batch) < EVENTS_PER_BATCH:
                    self._hurry.wait(PACE_SECONDS)
            except RunDeletedError:
                _logger.warning("%s: the run was deleted there; all events are sent again", self.shown)
                cursor.offset, cursor.runs = 0, {}
                self._writer = None
                waits += 1
                self._pause(waits)
            except RefusedError as error:
                self.refusal = str(error)
                self._mark_unavailable(cursor, self.refusal, "takes nothing of this stream")
                return
            except UnavailableError as error:
                self._mark_unavailable(cursor, str(error), "does not answer")
                waits += 1
                self._pause(waits)

    def _send(self, batch: Sequence[tuple[Event, int]], cursor: DeliveryCursor) -> None:
        if self._writer is None:
            self._writer = self.connect(dict(cursor.runs))
        # consecutive metrics go in one call, other events one by one
        for _, group in itertools.groupby(batch, key=lambda item: item[0]["kind"] == "metrics" or item[1]):
            events, offsets = zip(*group, strict=True)
            self._write(self._writer, events, cursor)
            if cursor.unavailable_since is not None:
                _logger.warning("%s: available again", self.shown)
            cursor.offset, cursor.runs = offsets[-1], dict(self._writer.runs)
            cursor.experiment = self._writer.experiment
            cursor.unavailable_since, cursor.reason = None, ""
            self._save(cursor)
            if self._stop.is_set():
                return

    def _write(self, writer: EventWriter, events: Sequence[Event], cursor: DeliveryCursor) -> None:
        try:
            writer.write(events)
        except (UnavailableError, RefusedError, RunDeletedError):
            raise
        except Exception as error:
            if len(events) > 1:
                for event in events:
                    self._write(writer, [event], cursor)
                return
            # a bug of ours is logged with its traceback, and must not hold back the events after it
            is_bug = not isinstance(error, RejectedError)
            kind = events[0]["kind"]
            cursor.rejected += 1
            _logger.warning(
                "%s: rejected (%s); an event of kind %s is skipped; once the cause is corrected, avcil sync --again "
                "sends it",
                self.shown,
                error,
                kind,
                exc_info=is_bug,
            )

    def _mark_unavailable(self, cursor: DeliveryCursor, reason: str, what: str) -> None:
        self._failures += 1
        self._writer = None
        if cursor.unavailable_since is None:
            cursor.unavailable_since = time.time()
            _logger.warning(
                "%s: %s (%s); training continues, its tracking events are kept in %s",
                self.shown,
                what,
                reason,
                self.queue.path,
            )
        cursor.reason = reason
        self._save(cursor)

    def _save(self, cursor: DeliveryCursor) -> None:
        try:
            self.queue.save_cursor(self.uri, cursor)
            self._is_saved = True
        except (OSError, StorageError) as error:  # the events are then sent again, without duplicates
            if self._is_saved:  # one warning for an outage of the disk, however often it is tried
                _logger.warning("%s", error)
            self._is_saved = False

    def _pause(self, waits: int) -> None:
        cap = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (waits - 1))
        seconds = random.uniform(0.5, 1.0) * cap
        if not self._hurry.is_set() and self._hurry.wait(seconds):
            return  # the step has ended: try at once
        if self._hurry.is_set():
            self._stop.wait(min(seconds, LONGEST_WAIT_AT_THE_END))
