"""Arrays of numbers or text in `.npy` bytes: parsed without pickle, the header compared with the bytes that are there.

numpy's own reader allocates what a header claims, opens archives, and raises many kinds of errors.
"""

import io
import math
import tokenize

import numpy as np

from avcil_dist.errors import DataError

# Errors of numpy for damaged headers: it reads them as Python text.
HEADER_FAULTS = (ValueError, TypeError, KeyError, RuntimeError, SyntaxError, tokenize.TokenError, UnicodeError)
READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def parse_npy(data: bytes, where: str) -> np.ndarray:
    """Return the array of numbers in `data`. Raises DataError, naming `where`, for anything else."""
    found = _parse(data, where)
    if found.dtype.kind not in "biuf" or found.dtype.itemsize > 8:
        raise DataError(f"{where}: an array of {found.dtype.name}, not of numbers")
    return found


def parse_words(data: bytes, where: str) -> list[str]:
    """Return the words in `data`, an array of text (N,). Raises DataError, naming `where`, for anything else."""
    found = _parse(data, where)
    if found.dtype.kind != "U" or found.ndim != 1:
        raise DataError(f"{where}: an array of {found.dtype.name} {found.shape}, not of words")
    try:
        words: list[str] = found.tolist()
    except ValueError:  # numbers that are no letters
        raise DataError(f"{where}: an array of damaged text") from None
    return words


def _parse(data: bytes, where: str) -> np.ndarray:
    """Return the array of numbers or text in `data`, in the byte order of this machine."""
    buffer = io.BytesIO(data)
    try:
        shape, is_fortran, dtype = READERS[np.lib.format.read_magic(buffer)](buffer)
    except (*HEADER_FAULTS, MemoryError) as error:
        raise DataError(f"{where}: not an array ({' '.join(str(error).split())})") from None
    if dtype.kind not in "biufU" or not dtype.itemsize:
        raise DataError(f"{where}: an array of {dtype.name}")
    content = data[buffer.tell() :]
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise DataError(f"{where}: {len(content)} bytes, its header claims {shape} of {dtype}")
    values = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
    return values.reshape(shape, order="F" if is_fortran else "C")
