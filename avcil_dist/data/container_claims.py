"""Numbers that an mp4 or mov file claims in its header, checked against its size before a decoder believes them.

A decoder makes an index entry for every claimed frame when it opens a file: a header of a few bytes can claim
billions. Other containers have no such numbers; their index grows with their data.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from avcil_dist.errors import DataError

HEADER_BYTES = 8  # of a box: its size and its type
FIRST_BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide")
PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
MAX_DEPTH = 10


def check_claims(file: BinaryIO, where: str) -> None:
    """Raise DataError, naming `where`, for a header that claims more frames than the file has bytes.

    The position in the file is its beginning afterwards.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(4)
    claimed = _claimed_frames(file, 0, size, 0) if file.read(4) in FIRST_BOXES else 0
    file.seek(0)
    if claimed > size:
        raise DataError(f"{where}: its header claims {claimed:,} frames in a file of {size:,} bytes")


def _claimed_frames(file: BinaryIO, begin: int, end: int, depth: int) -> int:
    """The largest number of frames that a table in the boxes from `begin` to `end` claims."""
    most, is_pcm, frames = 0, False, 0
    for kind, start, stop in _boxes(file, begin, end):
        if kind in PARENTS and depth < MAX_DEPTH:
            most = max(most, _claimed_frames(file, start, stop, depth + 1))
        elif kind in (b"stts", b"stsz", b"trun"):
            file.seek(start + 4)  # behind version and flags
            numbers = struct.unpack(">III", file.read(12).ljust(12, b"\0"))
            if kind == b"stts":  # one entry, of duration 1: samples of sound, which decoders read in chunks
                is_pcm = numbers[0] == 1 and numbers[2] == 1
            elif kind == b"stsz":
                frames = numbers[1]
            else:
                most = max(most, numbers[0])
    return most if is_pcm else max(most, frames)


def _boxes(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, begin and end of the content of each box."""
    while begin + HEADER_BYTES <= end:
        file.seek(begin)
        length, kind = struct.unpack(">I4s", file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"))
        start = begin + HEADER_BYTES
        if length == 1:
            length, start = int.from_bytes(file.read(8), "big"), start + 8
        stop = min(begin + length, end) if length else end
        if stop < start:
            return
        yield kind, start, stop
        begin = stop
