"""The bytes of a listed clip as one mp4 file: of a file or a part of it, a member of a tar, or a folder of pictures."""

from pathlib import Path

from avcil_dist import storage
from avcil_dist.errors import DataError, StorageError
from data_shards.cut import cut_clip
from data_shards.frame_series import series_clip, series_stamp
from data_shards.listings.listing import ClipFile
from data_shards.rejections import ClipRejectedError

FileStamp = tuple[int, int | str]  # size in bytes, and a value that changes with the file


def file_stamp(file: ClipFile) -> FileStamp | None:
    """Size and state of a file: of a tar its version, otherwise the time of the last change; None without a file."""
    if file.inside:
        return file.inside.size, file.inside.version
    if file.frames:
        return series_stamp(Path(file.path), file.frames)
    try:
        status = Path(file.path).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def read_clip(file: ClipFile) -> bytes:
    """The clip of a file; a part, and a file that is to be converted, as an mp4 of its own.

    Raises DataError for a file that cannot be read or cut.
    """
    try:
        if file.frames:
            return series_clip(file, file.frames)
        if file.inside is None:
            return cut_clip(file.path, *file.cut) if file.cut else Path(file.path).read_bytes()
    except OSError as error:
        raise ClipRejectedError("missing", f"{file.path}: cannot be read ({error.strerror})") from None
    span = file.inside
    try:
        data = storage.read_range(span.url, span.offset, span.offset + span.size)
    except DataError as error:  # of the tar: no fault of this clip
        raise StorageError(f"{error}; the tar was changed or removed; start again with the tars as they are") from None
    if file.cut is None:
        return data
    with storage.temporary_folder() as folder:
        copy = folder / Path(file.path).name
        copy.write_bytes(data)
        return cut_clip(str(copy), *file.cut)
