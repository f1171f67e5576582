"""Safe reader of the pickled dicts in published `.npy` files: no code of a pickle is run.

Python's unpickler calls whatever a pickle names. This one admits a few names and replaces each by a harmless
stand-in: containers, strings and numbers are made by the unpickler itself, numpy's scalars and arrays by the small
classes below, from bytes. Any other name is an error. Lists may hold plain values only; float arrays are admitted
where the caller stores each one as it is read, so that they are never in memory together.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avcil_dist.errors import DataError

SMALL_BYTES = 1 << 16
NUMBER = re.compile(r"[biuf](1|2|4|8)")
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
StoreArray = Callable[[np.ndarray], Any]


def read_pickled_dict(path: Path, store: StoreArray | None = None) -> dict[Any, Any]:
    """The dict in a `.npy` file that holds nothing else.

    `store` is called once with each float array; its result takes the array's place in the dict. Without `store`
    float arrays are not admitted. Raises DataError for a file that is missing, damaged, or names anything else.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            _, _, dtype = read_header(file)
            if not dtype.hasobject:
                raise DataError("plain numbers, not a dict")
            content = _Unpickler(file, store).load()
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"{path}: cannot be read as a pickled dict: {str(error) or type(error).__name__}") from None
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
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not admitted")
    return text.encode(encoding)


class _Type:
    """A numpy dtype, from its name and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not (code == "O8" or code == "O" or NUMBER.fullmatch(code)):
            raise pickle.UnpicklingError(f"the type {code!r} is not admitted; numbers are")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numbers(self, data: bytes) -> np.ndarray:
        if self.code.startswith("O"):
            raise pickle.UnpicklingError("objects where numbers belong")
        return np.frombuffer(data, dtype=np.dtype(f"{self.order}{self.code}"))


class _Array:
    """An array that `store` has stored, or the single object of an object array of no dimension."""

    __slots__ = ("_store", "value")

    def __init__(self, store: StoreArray | None) -> None:
        self._store = store
        self.value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
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


class _Unpickler(pickle._Unpickler):  # the Python version: the C version keeps all that it has read until its end
    def __init__(self, file: BinaryIO, store: StoreArray | None) -> None:
        super().__init__(file, encoding="latin1")
        self.memo = _Memo()
        scalar = _Name(lambda kind, data: kind.numbers(data)[0].item())
        array = _Name(lambda *_: _Array(store))
        self._admitted = {
            ("numpy", "dtype"): _Name(_Type),
            ("numpy", "ndarray"): _Name(None),
            ("builtins", "set"): _Name(set),
            ("builtins", "frozenset"): _Name(frozenset),
            ("__builtin__", "set"): _Name(set),
            ("__builtin__", "frozenset"): _Name(frozenset),
            ("_codecs", "encode"): _Name(_encoded),
        }
        for module in MULTIARRAY:
            self._admitted |= {(module, "_reconstruct"): array, (module, "scalar"): scalar}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not admitted") from None
