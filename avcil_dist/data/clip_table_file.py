"""File of a clip table: a `.npz` archive beside the manifest, which the processes of a node map into memory.

The archive is not compressed, and each column begins at a multiple of 64 bytes: `numpy.load` reads it, and so does a
mapping of the places that the manifest lists. It is named by its digest and never changed, so a manifest that is
written anew does not disturb the processes that use the old one.

A small table is read and verified by each process. A larger one is verified once per node: its digest and its clips
take seconds, its mapping does not. The marker of a verified file has the file's identity on the disk in its name. A
remote table is fetched into the shard cache, which verifies the digest.
"""

import hashlib
import logging
import mmap
import os
import platform
import struct
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from avcil_dist import storage
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_table import KEY_ENDS, KEYS, REGION, REGION_NUMBERS, ClipTable, Column, Rows, join_columns
from avcil_dist.data.shard import Sha256, Size
from avcil_dist.data.shard_cache import ShardCache, cache_folder
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.system.trusted_files import make_private_folder

SMALL_BYTES = 16 << 20  # some 300,000 clips; their verification takes some 0.2 s
ALIGNMENT = 64
LOCAL_HEADER, ZIP64_FIELD = 30, 20  # bytes of an archive before the name of a member, and after it
PADDING_FIELD = 0xD935  # the field in which other programs too align members of an archive
ColumnName = Annotated[str, Field(pattern=r"^(keys|key_ends|region|(offset|size)\.[A-Za-z0-9_.-]+)$", max_length=110)]
_logger = logging.getLogger(__name__)


class ColumnRecord(BaseModel):
    """Place of a column in the file: its first byte, and the number and type of its values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["uint8", "uint32", "int64", "float64"]
    offset: Size
    count: Size


class TableRecord(BaseModel):
    """A clip table as the manifest's JSON has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(min_length=1, max_length=4096)]
    bytes: Size
    sha256: Sha256
    columns: dict[ColumnName, ColumnRecord] = Field(max_length=203)


def write_table(folder: str, parts: Sequence[Rows]) -> TableRecord:
    """Write the clips of `parts`, one after the other, to a file in `folder`. Equal clips give equal bytes.

    The columns are made twice, for the name of the file and for its bytes, and are never in memory as a whole.
    """
    columns = join_columns(parts)
    digest = _Archive(None)
    places = digest.write_columns(columns)
    sha256 = digest.digest.hexdigest()
    name = f"clips-{sha256[:16]}.npz"
    with storage.new_file(storage.join(folder, name)) as file:
        _Archive(file).write_columns(columns)
    return TableRecord(url=name, bytes=digest.size, sha256=sha256, columns=places)


def open_table(
    folder: str,
    record: TableRecord,
    *,
    count: int,
    check: Callable[[ClipTable], None],
    owner: str,
    data: DataConfig | None = None,
) -> ClipTable:
    """Return the table of `count` clips in `folder`. `check` raises DataError for clips that cannot be.

    `owner` is the digest of the manifest whose shards `check` compares with. Raises DataError for a file that is
    missing, damaged, or not as `record` has it.
    """
    url = storage.join(folder, record.url)
    _check_columns(record, count)
    if record.bytes <= SMALL_BYTES:
        return _read(url, record, check)
    path = storage.local_path(url)
    if path is not None:
        try:
            with storage.open_regular(path) as file:
                return _map(url, file.fileno(), record, check, owner)
        except OSError as error:
            raise DataError(f"{record.url}: cannot be read ({error.strerror})") from None
    descriptor = _fetch(url, record, data)
    if descriptor is None:
        _logger.warning("%s: not in the shard cache, so each process has %d MB of it", url, record.bytes >> 20)
        return _read(url, record, check)
    try:
        return _map(url, descriptor, record, check, owner, is_fetched=True)
    finally:
        os.close(descriptor)  # the mapping has a copy of it, and so the lock of the cache's file


class _Archive:
    """Target of an archive's bytes: counts and digests them, and writes them to `file`, if any."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self.size, self.digest = 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        if self._file:
            self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """Required by `zipfile`; the file is flushed when it is closed."""

    def write_columns(self, columns: Sequence[Column]) -> dict[str, ColumnRecord]:
        """Write the archive; return the places of the columns."""
        places = {}
        with zipfile.ZipFile(self, "w") as archive:  # type: ignore[call-overload]  # it needs no more than `write`
            for column in columns:
                info = zipfile.ZipInfo(f"{column.name}.npy")  # its time is a fixed one
                header = LOCAL_HEADER + len(info.filename) + ZIP64_FIELD + 4
                fill = -(self.size + header) % ALIGNMENT
                info.extra = struct.pack("<HH", PADDING_FIELD, fill) + bytes(fill)
                with archive.open(info, "w", force_zip64=True) as member:
                    description = {"descr": column.dtype.str, "fortran_order": False, "shape": (column.count,)}
                    np.lib.format.write_array_header_1_0(member, description)
                    places[column.name] = ColumnRecord(dtype=column.dtype.name, offset=self.size, count=column.count)
                    for piece in column.pieces():
                        member.write(piece.tobytes())
        return places


def _check_columns(record: TableRecord, count: int) -> None:
    """Raise DataError for columns beyond the file, or not of `count` clips."""
    for name, column in record.columns.items():
        end = column.offset + column.count * np.dtype(column.dtype).itemsize
        if end > record.bytes or column.offset % ALIGNMENT:
            raise DataError(f"{record.url}: column {name}: not within the file's {record.bytes} bytes")
        expected = {KEYS: column.count, REGION: count * REGION_NUMBERS}.get(name, count)
        if column.count != expected:
            raise DataError(f"{record.url}: column {name}: {column.count} values, but {count} clips")
        kinds = {KEYS: ("uint8",), REGION: ("float64",)}.get(name, ("uint32", "int64"))
        if column.dtype not in kinds:
            raise DataError(f"{record.url}: column {name}: of {column.dtype}, not of {' or '.join(kinds)}")
    sizes = {name.replace("size.", "offset.", 1) for name in record.columns if name.startswith("size.")}
    if missing := {KEYS, KEY_ENDS} - record.columns.keys():
        raise DataError(f"{record.url}: no column {min(missing)}")
    if unpaired := sizes ^ {name for name in record.columns if name.startswith("offset.")}:
        raise DataError(f"{record.url}: column {min(unpaired)}: not both offset and size")


def _read(url: str, record: TableRecord, check: Callable[[ClipTable], None]) -> ClipTable:
    """Return the table in memory, verified."""
    data = storage.read_bytes(url, max_bytes=record.bytes)
    if len(data) != record.bytes or storage.sha256(data) != record.sha256:
        raise _changed(record)
    table = _table(np.frombuffer(data, dtype=np.uint8), record)
    check(table)
    return table


def _map(
    url: str,
    descriptor: int,
    record: TableRecord,
    check: Callable[[ClipTable], None],
    owner: str,
    *,
    is_fetched: bool = False,
) -> ClipTable:
    """Return the table mapped into memory, verified by this process or an earlier one of the node."""
    status = os.fstat(descriptor)
    if status.st_size != record.bytes:
        raise DataError(f"{record.url}: {status.st_size} bytes, the manifest has {record.bytes}")
    mapping = mmap.mmap(descriptor, record.bytes, access=mmap.ACCESS_READ)
    memory = np.frombuffer(mapping, dtype=np.uint8)
    table = _table(memory, record)

    def verify() -> None:
        _logger.info("%s: verifying the clip table, once per machine", url)
        if not is_fetched and hashlib.sha256(memory.data).hexdigest() != record.sha256:
            raise _changed(record)
        check(table)
        mapping.madvise(mmap.MADV_DONTNEED)  # of this process: the system keeps the bytes, for all

    # a cached file has a new time after each use, and its digest was compared when it was fetched
    identity = () if is_fetched else (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    _verify_once("\n".join(map(str, (owner, record.sha256, platform.node(), *identity))), verify)
    return table


def _verify_once(identity: str, verify: Callable[[], None]) -> None:
    """Call `verify`, unless this user did so on this machine before, for the same identity."""
    try:
        folder = make_private_folder(Path(tempfile.gettempdir()) / f"avcil-verified-{os.getuid()}")
        marker = folder / storage.sha256(identity.encode())
        lock = FileLock(f"{marker}.lock").acquire()
    except (ConfigError, OSError) as error:  # no folder that is trusted and can be written
        _logger.warning("a clip table is verified by each process (%s)", error)
        verify()
        return
    with lock:
        if not marker.exists():
            verify()
            marker.touch()


def _fetch(url: str, record: TableRecord, data: DataConfig | None) -> int | None:
    """Return a descriptor of the file in the shard cache; None where there is no cache, or no room in it."""
    data = data or DataConfig(manifest="manifest.json")
    if data.shard_cache == "none":
        return None
    with ThreadPoolExecutor(data.read_threads, thread_name_prefix="table") as threads:
        cache = ShardCache(
            cache_folder(data.shard_cache),
            int(data.shard_cache_gigabytes * 1e9),
            executor=threads,
            retry_seconds=data.retry_seconds,
            count=lambda name, amount: None,
            on_retry=lambda: None,
        )
        return cache.open(url, record.bytes, record.sha256)


def _table(memory: np.ndarray, record: TableRecord) -> ClipTable:
    return ClipTable(
        {
            name: np.frombuffer(memory, dtype=column.dtype, count=column.count, offset=column.offset)
            for name, column in record.columns.items()
        }
    )


def _changed(record: TableRecord) -> DataError:
    return DataError(f"{record.url}: its sha256 is not that of the manifest; it was changed or cut short")
