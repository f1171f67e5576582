"""Tells a tracking server what is in a spool: a thread beside the training, which never waits for it.

FileDigests go in order. One sender at a time tells a server, whatever the processes; what it cannot
tell now it tries again, with jitter, and what nobody could tell is told by the next sender.
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
from avcil_dist.tracking.event_queue import DeliveryCursor, Event, EventQueue

RECORDS_AT_A_TIME = 200
POLL_SECONDS = 1.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 10.0
LONGEST_WAIT_AT_THE_END = 1.0
JOIN_SECONDS = 2.0

_logger = logging.getLogger(__name__)


class AwayError(Exception):
    """The server does not answer, or cannot do it now."""


class RefusedError(Exception):
    """The server answers, and will never take this record."""


class RunGoneError(Exception):
    """A run that the server held was deleted there."""


class EventWriter(Protocol):
    """The way to one server. `runs`: the ids of the stream's runs there; `is_uploading`: a file is on its way."""

    runs: dict[str, str]
    is_uploading: bool

    def deliver(self, records: Sequence[Event]) -> None:
        """Tell the server these, of one kind. What it has been told already is not doubled. Raises the errors above."""


class Sender:
    """Tells one server; `start` begins, `close` ends it within a bound."""

    def __init__(
        self, spool: EventQueue, uri: str, connect: Callable[[dict[str, str]], EventWriter], *, shown: str
    ) -> None:
        self.spool, self.uri, self.connect, self.shown = spool, uri, connect, shown
        self._wake, self._hurry, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._failures = 0  # in all, so that one can see that another try was made
        self._delivery: EventWriter | None = None
        self._thread = threading.Thread(target=self._run, name="tracking sender", daemon=True)
        spool.on_append = self._wake.set

    def start(self) -> None:
        """ResumePolicy to send."""
        self._thread.start()

    def close(self, patience: float) -> bool:
        """Send what is left, and end; whether all is sent.

        Gives up when the server has been away for `patience` seconds, the time before counted, or when nothing
        moved for so long. A file that is on its way is waited for; the http client bounds that.
        """
        failures, moved_at, offset = self._failures, time.monotonic(), -1
        self._hurry.set()
        self._wake.set()
        while not self.spool.is_sent(self.uri) and self._thread.is_alive():
            note = self.spool.note(self.uri)
            if note.offset != offset:
                offset, moved_at = note.offset, time.monotonic()
            tried = self._failures > failures
            if tried and note.away_since is not None and time.time() - note.away_since >= patience:
                break
            uploads = self._delivery is not None and self._delivery.is_uploading
            if not uploads and time.monotonic() - moved_at >= patience:
                break
            self._stop.wait(0.05)
        self._stop.set()
        self._wake.set()
        self._thread.join(JOIN_SECONDS)  # one that hangs in a call is left behind: the spool knows how far it came
        self.spool.on_append = None
        return self.spool.is_sent(self.uri)

    def _run(self) -> None:
        lock = self.spool.sending_lock(self.uri)
        while not self._stop.is_set():
            try:
                lock.acquire(blocking=False)
            except (Timeout, OSError):  # another process sends
                self._stop.wait(POLL_SECONDS / 4)
                continue
            try:
                self._send()
            finally:
                lock.release()

    def _send(self) -> None:
        note, waits = self.spool.note(self.uri), 0
        while not self._stop.is_set():
            batch = list(self.spool.read(note.offset, limit=RECORDS_AT_A_TIME))
            if not batch:
                self._wake.wait(POLL_SECONDS)
                self._wake.clear()
                continue
            try:
                self._tell(batch, note)
                waits = 0
            except RunGoneError:
                _logger.warning("%s: the run was deleted there; it is told anew", self.shown)
                note.offset, note.runs = 0, {}
                self._delivery = None
            except AwayError as error:
                self._note_away(note, str(error))
                waits += 1
                self._pause(waits)

    def _tell(self, batch: Sequence[tuple[Event, int]], note: DeliveryCursor) -> None:
        if self._delivery is None:
            self._delivery = self.connect(dict(note.runs))
        # numbers that follow each other are told in one call, all else one by one
        for _, group in itertools.groupby(batch, key=lambda item: item[0]["kind"] == "metrics" or item[1]):
            records, offsets = zip(*group, strict=True)
            self._deliver(self._delivery, records)
            if note.away_since is not None:
                _logger.warning("%s: answers again", self.shown)
            note.offset, note.runs, note.away_since, note.reason = offsets[-1], dict(self._delivery.runs), None, ""
            self._save(note)
            if self._stop.is_set():
                return

    def _deliver(self, delivery: EventWriter, records: Sequence[Event]) -> None:
        try:
            delivery.deliver(records)
        except (AwayError, RunGoneError):
            raise
        except Exception as error:
            if len(records) > 1:
                for record in records:
                    self._deliver(delivery, [record])
                return
            # a fault of ours is loud, and no reason to hold back all that comes after it
            is_ours = not isinstance(error, RefusedError)
            kind = records[0]["kind"]
            _logger.warning("%s: refused (%s); a record of %s is left out", self.shown, error, kind, exc_info=is_ours)

    def _note_away(self, note: DeliveryCursor, reason: str) -> None:
        self._failures += 1
        self._delivery = None
        if note.away_since is None:
            note.away_since = time.time()
            _logger.warning(
                "%s: does not answer (%s); training goes on, and what it is to be told is kept in %s",
                self.shown,
                reason,
                self.spool.path,
            )
        note.reason = reason
        self._save(note)

    def _save(self, note: DeliveryCursor) -> None:
        try:
            self.spool.save_note(self.uri, note)
        except (OSError, StorageError) as error:  # it is told again then, which doubles nothing
            _logger.warning("%s: cannot be written (%s)", self.spool.folder, error)

    def _pause(self, waits: int) -> None:
        cap = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (waits - 1))
        seconds = random.uniform(0.5, 1.0) * cap
        if not self._hurry.is_set() and self._hurry.wait(seconds):
            return  # the step has ended: one try at once
        if self._hurry.is_set():
            self._stop.wait(min(seconds, LONGEST_WAIT_AT_THE_END))
