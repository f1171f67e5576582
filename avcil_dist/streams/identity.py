"""Identity of a stream: `stream.json` beside its step artifacts, with its id, its origin and changed settings.

The identity is created here, not by a tracking server, so a stream can begin without one.
"""

import uuid
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from avcil_dist import storage
from avcil_dist.errors import ArtifactError

FILE = "stream.json"


@dataclass(frozen=True)
class Change:
    """A setting that the user changed when the stream was resumed after `step`."""

    step: int
    key: str
    was: Any
    now: Any
    forced: bool


@dataclass(frozen=True)
class StreamIdentity:
    """`id` names the stream on every server. A fork has the run, and the step of it, that it continues as origin."""

    id: str
    origin_run: str | None = None
    origin_step: int | None = None
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


def read_identity(stream: str) -> StreamIdentity | None:
    """The identity in a stream's folder, or None where there is none. Raises ArtifactError for a damaged one."""
    url = storage.join(stream, FILE)
    if not storage.exists(url):
        return None
    try:
        return TypeAdapter(StreamIdentity).validate_python(storage.read_json(url))
    except ValidationError as error:
        fault = error.errors()[0]
        raise ArtifactError(
            f"{url}: not the identity of a stream ({'.'.join(map(str, fault['loc']))}: {fault['msg']}); restore it, "
            "or begin the stream anew with --restart"
        ) from None


def write_identity(stream: str, identity: StreamIdentity) -> None:
    """Write the identity of a stream atomically."""
    storage.write_json(storage.join(stream, FILE), asdict(identity))
