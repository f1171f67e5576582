"""Identity of a stream: `stream.json` beside its step artifacts, with its id, its origin and changed settings.

The identity is created here, not by a tracking server, so a stream can begin without one.
"""

import uuid
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from avcil_dist import storage
from avcil_dist.errors import ArtifactError

FILE = "stream.json"
MAX_STEP = 1 << 20

# The id names folders and tags: no character of it may be part of a path.
StreamId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
StepNumber = Annotated[int, Field(ge=0, lt=MAX_STEP)]


@dataclass(frozen=True)
class Change:
    """A setting that the user changed when the stream was resumed after `step`."""

    step: StepNumber
    key: Annotated[str, Field(max_length=200)]
    was: Any
    now: Any
    forced: bool


@dataclass(frozen=True)
class StreamIdentity:
    """`id` names the stream on every server. A fork has the run, and the step of it, that it continues as origin."""

    id: StreamId
    origin_run: Annotated[str, Field(max_length=200)] | None = None
    origin_step: StepNumber | None = None
    changes: tuple[Change, ...] = ()

    def allows(self, key: str, was: Any, now: Any, step: int) -> bool:
        """Whether the user made exactly this change when the stream was resumed after `step`."""
        return any((c.step, c.key, c.was, c.now) == (step, key, was, now) for c in self.changes)

    def renewed(self) -> "StreamIdentity":
        """The identity of a new stream with the same history."""
        return replace(self, id=uuid.uuid4().hex)


def new_identity() -> StreamIdentity:
    """A new identity without history."""
    return StreamIdentity(uuid.uuid4().hex)


def has_identity(stream: str) -> bool:
    """Whether a stream was begun in this folder."""
    return storage.exists(storage.join(stream, FILE))


def read_identity(stream: str) -> StreamIdentity | None:
    """The identity in a stream's folder, or None where there is none. Raises ArtifactError for a damaged one."""
    if not has_identity(stream):
        return None
    url = storage.join(stream, FILE)
    return storage.read_json(url, StreamIdentity, "the identity of a stream", fault=ArtifactError)


def write_identity(stream: str, identity: StreamIdentity) -> None:
    """Write the identity of a stream atomically."""
    storage.write_json(storage.join(stream, FILE), asdict(identity))
