"""Resumable transfer of a file from a source to the local disk.

The bytes so far are in `.NAME.part`, their source and its version in `.NAME.part.json`, so that a transfer continues
after a cut connection, after an interrupt and in another process. Bytes of two versions are never mixed.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from pydantic import BaseModel, Field

from avcil_dist import storage
from avcil_dist.errors import StorageError
from avcil_dist.storage.retry import cannot_write
from avcil_dist.text.redaction import redacted

MAX_FAILURES = 6  # one after another, without a byte between them
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 20.0
READ_BYTES = 8 << 20
Received = Callable[[int], None]  # takes the number of bytes of the file that are here

_logger = logging.getLogger(__name__)


class CutError(Exception):
    """A failure that the next try may not have: a connection that was cut, a server that is busy."""


class Opened(NamedTuple):
    """A file that is being read: the first byte, the size of the whole file if known, its version, and its blocks."""

    start: int
    total: int | None
    version: str
    blocks: Iterator[bytes]


class Source(Protocol):
    """A file that can be read from any byte on. `name` is its url."""

    name: str

    def size(self) -> int | None:
        """Size in bytes, if it is known."""

    def open(self, start: int, version: str) -> Opened:
        """Open the file at byte `start`, if it still has this version; else at 0. Raises CutError."""


class StorageSource:
    """A file of one of the storages of shards, local or remote."""

    def __init__(self, url: str) -> None:
        self.name = storage.check_url(url)

    def size(self) -> int | None:
        """Size in bytes."""
        return storage.size(self.name)

    def open(self, start: int, version: str) -> Opened:
        """Open the file at byte `start`; its ranges are retried by the storage."""
        total, now = storage.size(self.name), storage.version(self.name)
        begin = start if version == now and start <= total else 0
        return Opened(begin, total, now, self._blocks(begin, total))

    def _blocks(self, begin: int, total: int) -> Iterator[bytes]:
        for first in range(begin, total, READ_BYTES):
            yield storage.read_range(self.name, first, min(first + READ_BYTES, total))


class _Part(BaseModel):
    """Origin of the bytes of a part."""

    source: str = Field(max_length=4000)
    version: str = Field(max_length=2000)


def transfer(source: Source, path: Path, received: Received | None = None) -> None:
    """Copy a file to `path`, from the byte on that an earlier transfer reached.

    Raises StorageError when six tries in a row bring nothing, or the disk is full, and DataError for a missing file.
    """
    part, failures = _part_of(path), 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _continue(source, part, received)
            break
        except CutError as cut:
            after = part.stat().st_size if part.exists() else 0
            failures = 1 if after > before else failures + 1
            if failures >= MAX_FAILURES:
                raise StorageError(
                    f"{source.name}: {cut}; {failures} tries in a row brought nothing, {after} bytes are here; check "
                    "the network, or give a mirror with --from, then run the same command again: it continues"
                ) from None
            _logger.warning("%s: %s after %d bytes; continuing", redacted(source.name), redacted(str(cut)), after)
            cap = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1))
            time.sleep(cap * random.uniform(0.5, 1.0))
    try:
        part.replace(path)
    except OSError as error:
        raise cannot_write(str(path), error) from None
    with suppress(OSError):
        _notes_of(part).unlink(missing_ok=True)


def bytes_here(path: Path) -> int:
    """Return the number of bytes of a file that are on the disk, whole or in part."""
    for candidate in (path, _part_of(path)):
        if candidate.is_file():
            return candidate.stat().st_size
    return 0


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.part")


def _notes_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _continue(source: Source, part: Path, received: Received | None) -> None:
    """Append what is missing. Raises CutError where the source ends before its size."""
    version = _version_of(source, part)
    have = part.stat().st_size if version is not None else 0
    opened = source.open(have, version or "")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(str(_notes_of(part)), {"source": source.name, "version": opened.version})
        with part.open("ab" if opened.start else "wb") as file:
            have = _append(opened, file, received)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(str(part), error) from None
    if opened.total is not None and have != opened.total:
        if have > opened.total:
            part.unlink()
        raise CutError(f"{have} of {opened.total} bytes came")


def _append(opened: Opened, file: BinaryIO, received: Received | None) -> int:
    have = opened.start
    for block in opened.blocks:
        file.write(block)
        have += len(block)
        if received:
            received(have)
    return have


def _version_of(source: Source, part: Path) -> str | None:
    """Return the version that the bytes of a part are of; None where there are none of this source."""
    notes = _notes_of(part)
    if not (part.is_file() and notes.is_file()):
        return None
    noted = storage.read_json(str(notes), _Part, "the notes of a download", remedy=f"remove {part} and it")
    return noted.version if noted.source == source.name and noted.version else None
