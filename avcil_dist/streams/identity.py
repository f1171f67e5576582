"""A stream's own record, `stream.json` beside its step artifacts: who it is, where it came from, what was changed.

The identity is made here, not by a tracking server: a stream begins whether one answers or not.
"""

import uuid
from dataclasses import asdict, dataclass, replace
from typing import Any

from avcil_dist import storage

RECORD = "stream.json"


@dataclass(frozen=True)
class Change:
    """A setting that was changed, by the user's word, when the stream was resumed after `step`."""

    step: int
    key: str
    was: Any
    now: Any
    forced: bool


@dataclass(frozen=True)
class StreamIdentity:
    """`id` names the stream on every server. A fork's `origin` is the run, and the step of it, that it continues."""

    id: str
    origin_run: str | None = None
    origin_step: int | None = None
    changes: tuple[Change, ...] = ()

    def allows(self, key: str, was: Any, now: Any, step: int) -> bool:
        """Whether the user changed this setting, in these words, when the stream was resumed after `step`."""
        return any((c.step, c.key, c.was, c.now) == (step, key, was, now) for c in self.changes)

    def renamed(self) -> "StreamIdentity":
        """A stream of its own with the same past."""
        return replace(self, id=uuid.uuid4().hex)


def new_identity() -> StreamIdentity:
    """The record of a stream that begins."""
    return StreamIdentity(uuid.uuid4().hex)


def read_identity(stream: str) -> StreamIdentity | None:
    """The record in a stream's folder, or None."""
    url = storage.join(stream, RECORD)
    if not storage.exists(url):
        return None
    found = storage.read_json(url)
    return StreamIdentity(**found | {"changes": tuple(Change(**change) for change in found["changes"])})


def write_identity(stream: str, record: StreamIdentity) -> None:
    """Write it, as a whole."""
    storage.write_json(storage.join(stream, RECORD), asdict(record))
