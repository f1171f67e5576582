"""JSON files: read into a typed value, with bounds on size, depth, types and numbers; written with sorted keys.

Any file may have been changed by another program, a broken disk or a stranger. `T` is a type that pydantic validates: a
model, a dataclass, or a standard type such as `dict[str, str]`; its fields state the bounds. Validation is strict: a
number in quotes is no number. Nesting is bounded by the parser (200 levels).
"""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from avcil_dist.errors import AvcilError, DataError
from avcil_dist.storage.files import read_bytes, write_bytes

T = TypeVar("T")

MAX_JSON_BYTES = 64 << 20
LONGEST_SHOWN = 80
REMEDY = "restore it, or make it again"

_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(maxsize=64)(TypeAdapter)


def read_json(
    url: str,
    kind: type[T],
    what: str,
    *,
    remedy: str = REMEDY,
    max_bytes: int = MAX_JSON_BYTES,
    fault: type[AvcilError] = DataError,
) -> T:
    """Return the JSON file at `url` as a `kind`. Errors call it `what`, such as "a manifest", and end with `remedy`.

    Raises DataError for a file that is missing, not a regular file, or larger than `max_bytes`, and `fault` as
    `parse_json` does.
    """
    return parse_json(read_bytes(url, max_bytes=max_bytes), kind, what, url, remedy=remedy, fault=fault)


def parse_json(
    data: bytes, kind: type[T], what: str, where: str, *, remedy: str = REMEDY, fault: type[AvcilError] = DataError
) -> T:
    """Return JSON text as a `kind`. Raises `fault`, one line that names `where` and the first wrong value."""
    try:
        value: T = _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise fault(f"{where}: not valid JSON ({first['ctx']['error']}); {remedy}") from None
        raise fault(f"{where}: not {what} ({describe(error)}); {remedy}") from None
    return value


def describe(error: ValidationError) -> str:
    """Return the first fault of a validation as one short line: the place in the document, and the fault."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = _short(".".join(map(str, first["loc"])))
    message = _short(first["msg"].removeprefix("Value error, "))
    return f"{place}: {message}" if place else message


def write_json(url: str, value: Any) -> None:
    """Write `value` as JSON with sorted keys: equal values give equal bytes."""
    write_bytes(url, json.dumps(value, sort_keys=True, indent=1).encode())


def _short(text: str) -> str:
    """Return the text without characters that a terminal interprets, cut to a readable length."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"
