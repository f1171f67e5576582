"""Safe reader of the pickled dicts in published `.npy` files: no code of a pickle is run.

Python's unpickler calls whatever a pickle names. This one admits a few names and replaces each by a harmless
stand-in: containers, strings and numbers are made by the unpickler itself, numpy's scalars and arrays by the small
classes below, from bytes. Any other name is an error. Lists may hold plain values only; float arrays are admitted
where the caller stores each one as it is read, so that they are never in memory together.
"""

import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avcil_dist import storage
from avcil_dist.errors import DataError

SMALL_BYTES = 1 << 16
MAX_DEPTH = 4  # of tuples: the arguments of an array are two deep
MAX_INTEGER = 1 << 60  # smaller ones are their own hashes, so that no two are equal
MAX_SIZE = 1 << 40  # of a dimension
NUMBER = re.compile(r"[biuf](1|2|4|8)")
MAX_LINE = 1 << 20
LONGEST_TEXT = 200
REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.PERSID, pickle.BINPERSID, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.BYTEARRAY8),
)
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
StoreArray = Callable[[np.ndarray], Any]


def read_pickled_dict(path: Path, store: StoreArray | None = None) -> dict[Any, Any]:
    """The dict in a `.npy` file that holds nothing else.

    `store` is called once with each float array; its result takes the array's place in the dict. Without `store`
    float arrays are not admitted. Raises DataError for a file that is missing, damaged, or names anything else.
    """
    try:
        with storage.open_regular(path) as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            _, _, dtype = read_header(file)
            if not dtype.hasobject:
                raise DataError("plain numbers, not a dict")
            content = _Unpickler(_Bounded(file), store).load()
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except Exception as error:  # a broken pickle can raise anything
        text = " ".join(str(error).split())[:LONGEST_TEXT] or type(error).__name__
        raise DataError(f"{path}: cannot be read as a pickled dict: {text}") from None
    if isinstance(content, _Array):
        content = content.value
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict")
    return {key: value.value if isinstance(value, _Array) else value for key, value in content.items()}


class _Name:
    """A name that a pickle may call. It has no state that a pickle could set."""

    __slots__ = ("_make",)
    _make: Callable[..., Any] | None

    def __init__(self, make: Callable[..., Any] | None) -> None:
        object.__setattr__(self, "_make", make)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle must not change what it names")

    def __call__(self, *arguments: Any) -> Any:
        if self._make is None:
            raise pickle.UnpicklingError("a type is called where only its name is admitted")
        return self._make(*arguments)


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes as old pickles write them: as text, and the name of an encoding."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("an encoding that is not admitted")
    return text.encode(encoding)


class _Type:
    """A numpy dtype, from its name and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not (code == "O8" or code == "O" or NUMBER.fullmatch(code)):
            shown = code[:20] if isinstance(code, str) else type(code).__name__
            raise pickle.UnpicklingError(f"the type {shown} is not admitted; numbers are")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        self.order = order if type(order) is str and order in ("<", ">") else "="

    def numbers(self, data: Any) -> np.ndarray:
        if type(data) is not bytes:
            raise pickle.UnpicklingError("numbers that are no bytes")
        if self.code.startswith("O"):
            raise pickle.UnpicklingError("objects where numbers belong")
        return np.frombuffer(data, dtype=np.dtype(f"{self.order}{self.code}"))


class _Array:
    """An array that `store` has stored, or the single object of an object array of no dimension."""

    __slots__ = ("_store", "value")

    def __init__(self, store: StoreArray | None) -> None:
        self._store = store
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise pickle.UnpicklingError("an array without shape, type and bytes")
        _, shape, kind, is_fortran, data = state
        is_shape = type(shape) is tuple and all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape)
        if not is_shape or len(shape) > 8 or not isinstance(kind, _Type):
            raise pickle.UnpicklingError("an array without shape and type")
        if kind.code.startswith("O"):
            if shape != () or not isinstance(data, list) or len(data) != 1:
                raise pickle.UnpicklingError(f"an array of objects of shape {shape}; only a single dict is admitted")
            self.value = data[0]
            return
        if self._store is None or not kind.code.startswith("f"):
            raise pickle.UnpicklingError(f"an array of {kind.code} is not admitted here")
        values = kind.numbers(data)
        if math.prod(shape) != values.size:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {values.size} numbers")
        self.value = self._store(values.reshape(shape, order="F" if is_fortran else "C"))


class _Memo(dict[int, Any]):
    """The memo of an unpickler, without the bytes of arrays: a pickle never refers to them again."""

    def __setitem__(self, key: int, value: Any) -> None:
        if not (isinstance(value, bytes) and len(value) > SMALL_BYTES):
            super().__setitem__(key, value)


class _Bounded:
    """A file that is not read beyond its end: the length of a string is a claim, for which memory would be taken."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size - file.tell()

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise EOFError("the file ends within it")
        self._left -= size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(min(MAX_LINE, self._left))
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise EOFError("a line that does not end")
        return line

    def readinto(self, buffer: Any) -> int:
        raise pickle.UnpicklingError("a buffer outside the pickle is not admitted")


def _check_tuple(values: Any) -> None:
    """Refuse deep tuples: Python hashes and frees them by recursion in C."""
    if _depth(values) > MAX_DEPTH:
        raise pickle.UnpicklingError("tuples are nested too deeply")


def _depth(values: Any) -> int:
    """Depth of nested tuples. All inner ones were checked when they were made, so the recursion is short."""
    return 1 + max(map(_depth, values), default=0) if type(values) is tuple else 0


def _check_keys(keys: Any) -> None:
    """Refuse keys whose hash costs time, or is that of another key."""
    for key in keys:
        if not (type(key) is str or (type(key) is int and -MAX_INTEGER < key < MAX_INTEGER)):
            raise pickle.UnpicklingError("a key that is neither text nor a number of usual size")


def _set(values: Any = ()) -> set[Any]:
    if type(values) is not list:
        raise pickle.UnpicklingError("a set that is not made of a list")
    _check_keys(values)
    return set(values)


class _Unpickler(pickle._Unpickler):  # the Python version: the C version keeps all that it has read until its end
    def __init__(self, file: _Bounded, store: StoreArray | None) -> None:
        super().__init__(file, encoding="latin1")
        self.memo = _Memo()
        scalar = _Name(lambda kind, data: kind.numbers(data)[0].item())
        array = _Name(lambda *_: _Array(store))
        self._admitted = {
            ("numpy", "dtype"): _Name(_Type),
            ("numpy", "ndarray"): _Name(None),
            ("builtins", "set"): _Name(_set),
            ("builtins", "frozenset"): _Name(_set),
            ("__builtin__", "set"): _Name(_set),
            ("__builtin__", "frozenset"): _Name(_set),
            ("_codecs", "encode"): _Name(_encoded),
        }
        for module in MULTIARRAY:
            self._admitted |= {(module, "_reconstruct"): array, (module, "scalar"): scalar}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not admitted") from None


def _refuse(unpickler: Any) -> None:
    raise pickle.UnpicklingError("an operation that no dict of plain values needs")


def _before(check: Callable[[Any], None], load: Callable[[Any], None]) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        check(unpickler.stack)
        load(unpickler)

    return checked


def _then_check_tuple(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        load(unpickler)
        _check_tuple(unpickler.stack[-1])

    return checked


def _limit(dispatch: dict[int, Callable[[Any], None]]) -> dict[int, Callable[[Any], None]]:
    """Return the table of operations with checks; `stack` holds the values since the last mark."""
    limited = dispatch | {code[0]: _refuse for code in REFUSED}
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        limited[code[0]] = _then_check_tuple(dispatch[code[0]])
    for code in (pickle.ADDITEMS, pickle.FROZENSET):
        limited[code[0]] = _before(_check_keys, dispatch[code[0]])
    for code in (pickle.DICT, pickle.SETITEMS):
        limited[code[0]] = _before(lambda stack: _check_keys(stack[::2]), dispatch[code[0]])
    limited[pickle.SETITEM[0]] = _before(lambda stack: _check_keys(stack[-2:-1]), dispatch[pickle.SETITEM[0]])
    return limited


_Unpickler.dispatch = _limit(pickle._Unpickler.dispatch)
