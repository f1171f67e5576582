"""Members of a tar that is read once, from beginning to end, with its size and digest.

A header is a claim. Its cost is bounded: the bytes of a member are in the file, headers of headers are small and few,
and the content that is read is that of small members. Sparse members are refused.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from avcil_dist.errors import DataError

READ_BYTES = 1 << 20
MAX_CONTENT_BYTES = 4 << 20  # of metadata
MAX_HEADER_BYTES = 1 << 20  # of a long name, or of the fields of a pax header
# Errors of Python's reader for damaged headers: numbers, encodings and nesting that it does not expect.
FAULTS = (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, RecursionError, EOFError)


class Member(NamedTuple):
    """A file in a tar: its name without `./`, the place of its bytes, and its content if it is metadata."""

    name: str
    offset: int
    size: int
    content: bytes | None


class DigestingReader:
    """Reader of a file of `total` bytes from beginning to end; computes size and sha256 of the bytes read."""

    def __init__(self, file: Any, total: int) -> None:
        self._file = file
        self.total = total
        self.size = 0
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = bytes(self._file.read(size))
        self.digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> None:
        """Read to the end of the file."""
        while self.read(READ_BYTES):
            continue


class Header(tarfile.TarInfo):
    """Header of a member. Damaged ones end the tar with an error; Python's reader takes some for the end of it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        """Return the next header. Raises ReadError for a damaged one."""
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        is_extension = self.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.type == tarfile.GNUTYPE_SPARSE or (is_extension and not 0 <= self.size <= MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of type {self.type!r} and {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def tar_members(reader: DigestingReader, url: str, wanted: tuple[str, ...]) -> Iterator[Member]:
    """Yield the regular files of a tar, in its order, with the content of those whose names end in one of `wanted`.

    Hidden files, such as those of macOS, are passed over. Raises DataError for a tar that is damaged or compressed.
    """
    opened: Any = tarfile.open  # its type has no reader that is not a file
    with typed(url, lambda: opened(fileobj=reader, mode="r|", bufsize=READ_BYTES, tarinfo=Header)) as tar:
        while (info := typed(url, tar.next)) is not None:
            tar.members = []  # the tar keeps all that it has read
            if info.issparse() or (not info.islnk() and info.offset_data + info.size > reader.total):
                raise DataError(f"{url}: not a tar, or cut: {info.name[:200]!r} claims more bytes than there are")
            name = info.name.removeprefix("./")
            if not info.isreg() or name.rpartition("/")[2].startswith("."):
                continue
            content = None
            if name.endswith(wanted):
                if info.size > MAX_CONTENT_BYTES:
                    raise DataError(
                        f"{url}: {name}: {info.size} bytes of metadata; at most {MAX_CONTENT_BYTES} are read"
                    )
                member = tar.extractfile(info)
                content = typed(url, member.read) if member else b""
            yield Member(name, info.offset_data, info.size, content)


def typed(url: str, call: Any) -> Any:
    """Return `call()`. Raises DataError for the errors of Python's reader of tars."""
    try:
        return call()
    except FAULTS as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{url}: not a tar, or cut or compressed ({text})") from None
