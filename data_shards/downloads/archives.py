"""Published archives: a zip in one file or in several parts, of which the two files of features are taken.

Names in the archive decide nothing: a member's content goes to a name of ours. Links, encrypted members and members
that claim more than the archive can hold are refused.
"""

import bisect
import io
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, TypeVar, cast

from avcil_dist import storage
from avcil_dist.errors import DataError
from avcil_dist.storage.local import replacing
from data_shards.downloads.disk import check_room
from data_shards.workers import Progress

ENDINGS = (".npy", ".h5", ".hdf5")
NOTES = "members.json"
MAX_MEMBERS = 100_000
MAX_RATIO = 1032  # of deflate: more is no archive
READ_BYTES = 1 << 22
FAULTS = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error),
    *(EOFError, NotImplementedError, ValueError, RuntimeError),
)
T = TypeVar("T")


class Features(NamedTuple):
    """Paths of the unpacked features."""

    visual: Path
    audio: Path


def unpack_features(parts: Sequence[Path], folder: Path, progress: Progress | None = None) -> Features:
    """Unpack the visual and the audio features of an archive into `folder`; its own that are there already are kept.

    `progress` is called with the MiB written and their total. Raises DataError for an archive that is damaged or holds
    other files, StorageError where the disk has no room.
    """
    name = parts[0]
    with ExitStack() as stack:
        joined = stack.enter_context(_JoinedFile(parts))
        archive = _typed(name, lambda: stack.enter_context(zipfile.ZipFile(io.BufferedReader(joined, READ_BYTES))))
        members = {kind: _member(archive, kind, joined.size, name) for kind in Features._fields}
        _keep_own(folder, members)
        paths = {kind: folder / f"{kind}{PurePosixPath(info.filename).suffix}" for kind, info in members.items()}
        missing = [kind for kind in members if not _is_there(paths[kind], members[kind])]
        total = sum(members[kind].file_size for kind in missing)
        check_room(folder, total, f"to unpack {name.name}")
        done = 0
        for kind in missing:
            done = _extract(archive, members[kind], paths[kind], name, _counter(progress, done, total))
    return Features(**paths)


def _counter(progress: Progress | None, before: int, total: int) -> Callable[[int], int]:
    done = before

    def count(size: int) -> int:
        nonlocal done
        done += size
        if progress:
            progress(done >> 20, total >> 20)
        return done

    return count


def _member(archive: zipfile.ZipFile, kind: str, size: int, name: Path) -> zipfile.ZipInfo:
    """Return the member with the features of one modality: the file whose name has that word."""
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"{name}: {len(infos)} members; not an archive of features")
    found = [info for info in infos if _is_of(PurePosixPath(info.filename), kind)]
    if len(found) != 1:
        listed = ", ".join(info.filename for info in infos[:6])
        raise DataError(
            f"{name}: {len(found)} files of {kind} features ({' or '.join(ENDINGS)}) in it, of {len(infos)} members: "
            f"{listed[:200]}; unpack it by hand, and use avcil shards import-features"
        )
    (info,) = found
    kind_of_file = stat.S_IFMT(info.external_attr >> 16)
    if kind_of_file not in (0, stat.S_IFREG) or info.flag_bits & 0x1:
        raise DataError(f"{name}: {info.filename!r} is a link, a device or encrypted; not an archive of features")
    if info.file_size > MAX_RATIO * max(info.compress_size, 1) or info.compress_size > size:
        raise DataError(f"{name}: {info.filename!r} claims {info.file_size} bytes, more than the archive can hold")
    return info


def _is_of(path: PurePosixPath, kind: str) -> bool:
    is_hidden = path.name.startswith(".") or "__MACOSX" in path.parts
    return kind in path.name.lower() and path.suffix in ENDINGS and not is_hidden


def _keep_own(folder: Path, members: Mapping[str, zipfile.ZipInfo]) -> None:
    """Remove features of other members than these, whose sizes and CRC-32 are noted in the folder."""
    url, kind_of_notes, remedy = str(folder / NOTES), dict[str, tuple[int, int]], f"remove the folder {folder}"
    own = {kind: (info.file_size, info.CRC) for kind, info in members.items()}
    if not storage.exists(url) or own != storage.read_json(url, kind_of_notes, "notes of an archive", remedy=remedy):
        remove_unpacked(folder)
        storage.write_json(url, own)


def _is_there(path: Path, info: zipfile.ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size


def _extract(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, name: Path, count: Callable[[int], int]
) -> int:
    done = 0
    with replacing(path) as file:
        member = _typed(name, lambda: archive.open(info))
        with member:
            while block := _typed(name, lambda: member.read(READ_BYTES)):
                file.write(block)
                done = count(len(block))
    if path.stat().st_size != info.file_size:
        raise DataError(f"{name}: {info.filename!r} is cut; remove the archive to download it again")
    return done


def _typed(name: Path, call: Callable[[], T]) -> T:
    """Return `call()`. Raises DataError for the errors of Python's reader of archives."""
    try:
        return call()
    except FAULTS as error:
        text = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{name}: not a zip, or damaged ({text}); remove it to download it again") from None


class _JoinedFile(io.RawIOBase):
    """Files read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._starts = [0]
        for path in self._paths:
            self._starts.append(self._starts[-1] + storage.size(str(path)))
        self.size = self._starts[-1]
        self._position, self._open_number = 0, -1
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise zipfile.BadZipFile("a place before its beginning")
        self._position = position
        return position

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        number = min(bisect.bisect_right(self._starts, self._position) - 1, len(self._paths) - 1)
        if number != self._open_number:
            self.close_part()
            self._file, self._open_number = storage.open_regular(self._paths[number]), number
        assert self._file is not None
        self._file.seek(self._position - self._starts[number])
        read = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += read
        return int(read)

    def close_part(self) -> None:
        """Close the part that is open."""
        if self._file is not None:
            self._file.close()
            self._file, self._open_number = None, -1

    def close(self) -> None:
        self.close_part()
        super().close()


def remove_unpacked(folder: Path) -> None:
    """Remove unpacked features; they can be made again from the archive."""
    shutil.rmtree(folder, ignore_errors=True)
