"""Tars by url: lists of them with ranges and wildcards, and their members without reading what is in them."""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError
from data_shards.tar_stream import MAX_CONTENT_BYTES, Header, Member, typed

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
WILDCARD = re.compile(r"[*?\[]")
MAX_TARS = 1_000_000
BLOCK_BYTES = 1 << 16  # read at a time, so that small members between large ones are few requests
MAX_READ_BYTES = 1 << 26  # of a header; what is longer is no header


def expand_urls(urls: Sequence[str]) -> list[str]:
    """The urls of tars, `{000..099}` as WebDataset's ranges and `*`, `?`, `[…]` as wildcards.

    Raises ConfigError for a range that counts backwards or has too many numbers, for wildcards that match nothing, and
    for a tar that comes twice.
    """
    found = [url for pattern in urls for part in _with_ranges(pattern) for url in _matching(part)]
    if len(set(found)) < len(found):
        double = next(url for number, url in enumerate(found) if url in found[:number])
        raise ConfigError(f"{double}: the tar is given twice; give it once")
    return found


def _with_ranges(pattern: str) -> list[str]:
    expanded = [""]
    for number, piece in enumerate(RANGE.split(pattern)):
        if number % 3 == 0:
            expanded = [text + piece for text in expanded]
        elif number % 3 == 1:
            first = piece
        else:
            count = int(piece) - int(first) + 1
            if count < 1 or count * len(expanded) > MAX_TARS:
                raise ConfigError(f"{pattern}: {{{first}..{piece}}} is not a range of 1 to {MAX_TARS} tars")
            width = len(first) if first.startswith("0") or len(first) == len(piece) else 0
            numbers = [str(value).zfill(width) for value in range(int(first), int(piece) + 1)]
            expanded = [text + value for text in expanded for value in numbers]
    return expanded


def _matching(url: str) -> list[str]:
    if not WILDCARD.search(url):
        return [storage.check_url(url)]
    found = storage.find(url)
    if not found:
        raise ConfigError(f"{url}: no file matches it")
    return found


def indexed_members(url: str, wanted: tuple[str, ...] = ()) -> Iterator[Member]:
    """The regular files of a tar, in its order; hidden files, such as those of macOS, are passed over.

    Only headers are read, and the content of small files whose names end in one of `wanted`. Raises DataError for a
    file that is missing, cut, compressed or no tar.
    """
    file = _RangeFile(url)
    opened: Any = tarfile.open  # its type has no reader that is not a file
    with typed(url, lambda: opened(fileobj=file, mode="r:", tarinfo=Header)) as tar:
        while (info := typed(url, tar.next)) is not None:
            tar.members = []  # the tar keeps all that it has read
            name = info.name.removeprefix("./")
            if info.issparse():
                raise DataError(f"{url}: {name[:200]!r} is a sparse file; make the tar without --sparse")
            if info.isreg() and not name.rpartition("/")[2].startswith("."):
                is_read = name.endswith(wanted) and info.size <= MAX_CONTENT_BYTES
                content = file.read_at(info.offset_data, info.size) if is_read else None
                yield Member(name, info.offset_data, info.size, content)
        typed(url, lambda: _check_end(file, tar.offset))


def _check_end(file: "_RangeFile", offset: int) -> None:
    rest = file.read_at(offset, BLOCK_BYTES)
    if len(rest) < tarfile.BLOCKSIZE:  # a tar ends with blocks of zeros
        raise tarfile.ReadError("unexpected end of data")
    if any(rest):
        raise tarfile.ReadError("another archive follows its end")


class _RangeFile(io.RawIOBase):
    """A file by url, read in ranges with retries: nothing stays open."""

    def __init__(self, url: str) -> None:
        self._url, self.size = url, storage.size(url)
        self._position, self._start, self._block = 0, 0, b""

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on; the position stays."""
        position, self._position = self._position, offset
        data = self.read(size)
        self._position = position
        return data

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        end = min(self._position + size, self.size)
        if self._position < self._start or end > self._start + len(self._block):
            self._start = self._position
            stop = min(max(end, self._start + BLOCK_BYTES), self.size)
            self._block = storage.read_range(self._url, self._start, stop) if stop > self._start else b""
        data = self._block[self._position - self._start : max(end - self._start, 0)]
        self._position += len(data)
        return data
