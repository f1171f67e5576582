"""Durable queue of tracking events on local disk. Training appends, the sender thread reads; no network I/O here.

`events.jsonl` holds one event per line, in order, for the whole life of a stream; no line is ever removed.
Each server has a delivery cursor in a file of its own, so a stream can be sent to another server, from the
first event, at any time.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from filelock import FileLock
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from avcil_dist import storage
from avcil_dist.errors import ArtifactError
from avcil_dist.streams.identity import StepNumber
from avcil_dist.tracking.tags import STREAM_ID

Event = dict[str, Any]
FILE = "events.jsonl"
FOLDER = "events"
UNWRITTEN = 10_000  # events that are kept in memory

_logger = logging.getLogger(__name__)


@dataclass
class DeliveryCursor:
    """Position of one server in the queue.

    `offset`: bytes of the queue that the server has. `runs`: ids of the stream's runs there. `experiment`: the id of
    their experiment; none on a server without experiments. `unavailable_since`: Unix time of the first failed call of
    an outage, with its `reason`. `rejected`: events that the server will never take as they are; they were skipped.
    """

    offset: Annotated[int, Field(ge=0)] = 0
    runs: dict[str, str] = field(default_factory=dict)
    unavailable_since: float | None = None
    reason: str = ""
    rejected: int = 0
    experiment: str | None = None

    def __post_init__(self) -> None:
        # a file of an earlier version has the experiment among the runs
        self.experiment = self.runs.pop("experiment", self.experiment)


class _Line(TypedDict):
    time: NotRequired[Annotated[int, Field(ge=0, lt=2**53)]]


class _Open(_Line):
    kind: Literal["open"]
    name: str
    parameters: dict[str, Any]
    tags: dict[str, str]
    tracking: NotRequired[dict[str, Any]]
    output: NotRequired[str]
    server: NotRequired[str]
    is_elsewhere: NotRequired[bool]


class _Begin(_Line):
    kind: Literal["begin"]
    step: StepNumber
    name: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    tags: NotRequired[dict[str, str]]
    shared_tags: NotRequired[dict[str, str]]


class _Metrics(_Line):
    kind: Literal["metrics"]
    run: str
    position: int
    values: dict[str, float]


class _Artifact(_Line):
    kind: Literal["artifact"]
    step: StepNumber
    committed: str


class _Tags(_Line):
    kind: Literal["tags"]
    run: str
    tags: dict[str, str]


class _Dataset(_Line):
    kind: Literal["dataset"]
    run: str
    name: str
    digest: str
    url: str


class _File(_Line):
    kind: Literal["file"]
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9]+)?$", max_length=100)]


class _Register(_Line):
    kind: Literal["register"]
    step: StepNumber
    name: str


class _End(_Line):
    kind: Literal["end"]
    run: str
    status: str


_CURSOR = TypeAdapter(DeliveryCursor)
_EVENT: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        _Open | _Begin | _Metrics | _Artifact | _Tags | _Dataset | _File | _Register | _End,
        Field(discriminator="kind"),
    ]
)


class EventQueue:
    """The events of one stream, in a local folder. Any number of processes may append; each line appears whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.on_append: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._reported = 0  # offset behind the last damaged line that was reported
        self._unwritten: list[bytes] = []  # lines that a full disk did not take; they are written with the next one

    def append(self, kind: str, *, is_synced: bool = True, **values: Any) -> None:
        """Append an event; it is synced to disk when this returns, unless `is_synced` is false.

        An event that is not synced survives the end of this process, not that of the machine.

        A write error is logged, not raised: the event is then kept in memory, and written by the next call that can.
        """
        event = {"kind": kind, "time": int(time.time() * 1000)} | values
        self._append([json.dumps(event).encode() + b"\n"], is_synced)
        for call in self.on_append:
            call()

    def flush(self) -> int:
        """Write the events that the disk did not take. Returns the number of those that it does not take now either."""
        if self._unwritten:
            self._append([])
        return len(self._unwritten)

    def _append(self, lines: list[bytes], is_synced: bool = True) -> None:
        with self._lock:
            was_full = bool(self._unwritten)
            self._unwritten = (self._unwritten + lines)[-UNWRITTEN:]
            try:
                self._write(b"".join(self._unwritten), is_synced)
            except OSError as error:
                if not was_full:
                    _logger.warning("%s: cannot be written (%s); events are kept in memory", self.path, error)
                return
            self._unwritten = []
            if was_full:
                _logger.warning("%s: written again, with the events of the meantime", self.path)

    def read(self, offset: int, *, limit: int, kind: str | None = None) -> Iterator[tuple[Event, int]]:
        """Yield at most `limit` events from `offset` on, each with the offset behind it. Damaged lines are skipped.

        With `kind` only events of that kind are parsed and yielded.
        """
        mark = b"" if kind is None else f'{{"kind": "{kind}"'.encode()
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            while limit and (line := file.readline()).endswith(b"\n"):  # else the end, or a line still being written
                offset += len(line)
                if not line.startswith(mark):
                    continue
                event = _parse(line)
                if event is not None:
                    limit -= 1
                    yield event, offset
                elif offset > self._reported:  # one warning for each line, however often it is read
                    self._reported = offset
                    _logger.warning("%s: a damaged line is skipped", self.path)

    def events(self, kind: str) -> list[Event]:
        """All events of a kind, from the first."""
        return [event for event, _ in self.read(0, limit=self.size(), kind=kind)]

    def last(self, kind: str) -> Event | None:
        """The newest event of a kind; the others are not parsed, as there may be many."""
        start, found = json.dumps({"kind": kind}).encode().removesuffix(b"}"), None
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    if line.startswith(start) and line.endswith(b"\n"):
                        found = _parse(line) or found
        return found

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cursor(self, uri: str) -> DeliveryCursor:
        """The cursor of a server; at the first event where the file is missing, unreadable or beyond the queue."""
        try:
            cursor = _CURSOR.validate_json(self._cursor_path(uri).read_bytes())
        except (OSError, ValueError):
            return DeliveryCursor()
        return cursor if cursor.offset <= self.size() else DeliveryCursor()

    def save_cursor(self, uri: str, cursor: DeliveryCursor) -> None:
        """Write the cursor of a server atomically."""
        storage.write_json(str(self._cursor_path(uri)), vars(cursor))

    def is_sent(self, uri: str) -> bool:
        """Whether the server has every event."""
        return next(self.read(self.cursor(uri).offset, limit=1), None) is None

    def sender_lock(self, uri: str) -> FileLock:
        """Lock of the one process that sends to this server."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._cursor_path(uri).with_suffix(".lock"))

    def _cursor_path(self, uri: str) -> Path:
        return self.folder / f"cursor-{hashlib.sha256(uri.encode()).hexdigest()[:12]}.json"

    def _write(self, lines: bytes, is_synced: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")), self.path.open("ab+", buffering=0) as file:
            end = file.tell()
            if end and not _ends_with_newline(file.fileno()):  # a killed writer left half a line: close it
                lines = b"\n" + lines
            try:
                while lines:
                    lines = lines[file.write(lines) :]  # a disk that becomes full takes a part
                if is_synced:
                    os.fsync(file.fileno())
            except OSError:  # a full disk has taken a part of the lines; all are written again later
                with suppress(OSError):
                    os.ftruncate(file.fileno(), end)
                raise


def _parse(line: bytes) -> Event | None:
    """The event of a line; None for a damaged one, such as a killed writer or a full disk leaves."""
    try:
        event = json.loads(line)
        _EVENT.validate_python(event)
    except (ValueError, RecursionError):
        return None
    return dict(event)


def _ends_with_newline(descriptor: int) -> bool:
    end = os.lseek(descriptor, 0, os.SEEK_END)
    return os.pread(descriptor, 1, end - 1) == b"\n"


def queue_folder(stream: str, stream_id: str) -> Path:
    """The folder of a stream's queue: in the stream's folder, or in the user's state folder for object storage.

    Raises ArtifactError for an id that is no plain name, so that the queue stays in the state folder.
    """
    local = storage.local_path(stream)
    if local is not None:
        return Path(local) / FOLDER
    if not STREAM_ID.fullmatch(stream_id):
        raise ArtifactError(f"{stream}: {stream_id!r} is not the id of a stream; begin the stream anew with --restart")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "avcil-dist" / FOLDER / stream_id
