"""What a tracking server is to be told, on disk: written by who trains, read by who sends. Nothing here talks to one.

`spool.jsonl` holds one record a line, in order, for the whole life of a stream; nothing is ever
taken out of it. How far a server has been told it is in a note of its own for each server, so that
a stream can be told to another server, from its beginning, at any time.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from avcil_dist import storage

Event = dict[str, Any]
FILE = "spool.jsonl"
FOLDER = "spool"

_logger = logging.getLogger(__name__)


@dataclass
class DeliveryCursor:
    """How far a server has been told: bytes of the spool, the runs' ids there, since when it does not answer."""

    offset: int = 0
    runs: dict[str, str] = field(default_factory=dict)
    away_since: float | None = None
    reason: str = ""


class EventQueue:
    """The records of one stream, in a local folder. Any number of processes may write; each line appears whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.on_append: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def append(self, kind: str, **values: Any) -> None:
        """Add a record, on the disk when this returns. A disk that refuses is said, and ends nothing."""
        record = {"kind": kind, "time": int(time.time() * 1000)} | values
        line = json.dumps(record).encode() + b"\n"
        try:
            with self._lock:
                self._write(line)
        except OSError as error:
            _logger.warning("%s: cannot be written (%s); the tracking server will not be told this", self.path, error)
        if self.on_append:
            self.on_append()

    def read(self, offset: int, *, limit: int) -> Iterator[tuple[Event, int]]:
        """At most `limit` records from `offset` on, each with the offset behind it. A damaged line is passed over."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for _ in range(limit):
                line = file.readline()
                if not line.endswith(b"\n"):  # the end, or a line that is being written
                    return
                offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:  # of a process that was killed while it wrote
                    _logger.warning("%s: a line that was cut is passed over", self.path)
                    continue
                yield record, offset

    def records(self, kind: str) -> list[Event]:
        """All records of a kind, from the beginning."""
        return [record for record, _ in self.read(0, limit=self.size()) if record["kind"] == kind]

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def note(self, uri: str) -> DeliveryCursor:
        """How far this server has been told; nothing, where the note is missing or cannot be read."""
        try:
            return DeliveryCursor(**json.loads(self._note_path(uri).read_text()))
        except (OSError, ValueError, TypeError):
            return DeliveryCursor()

    def save_note(self, uri: str, note: DeliveryCursor) -> None:
        """Write it, atomically."""
        storage.write_json(str(self._note_path(uri)), vars(note))

    def is_sent(self, uri: str) -> bool:
        """Whether the server has been told everything."""
        return next(self.read(self.note(uri).offset, limit=1), None) is None

    def sending_lock(self, uri: str) -> FileLock:
        """Whoever holds it is the one who tells this server."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._note_path(uri).with_suffix(".lock"))

    def _note_path(self, uri: str) -> Path:
        return self.folder / f"sent-{hashlib.sha256(uri.encode()).hexdigest()[:12]}.json"

    def _write(self, line: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")), self.path.open("ab+") as file:
            if file.tell() and not _ends_a_line(file.fileno()):  # a writer was killed: its half line counts as one
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _ends_a_line(descriptor: int) -> bool:
    end = os.lseek(descriptor, 0, os.SEEK_END)
    return os.pread(descriptor, 1, end - 1) == b"\n"


def queue_folder(stream: str, stream_id: str) -> Path:
    """Where a stream's spool is: in its own folder, or among the user's files where that is on object storage."""
    local = storage.local_path(stream)
    if local is not None:
        return Path(local) / FOLDER
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "avcil-dist" / FOLDER / stream_id
