"""Errors as text that ranks exchange. Text from outside makes a bounded error of a known type, and nothing else."""

import json
from typing import Any

from avcil_dist import errors
from avcil_dist.errors import AvcilError, RankError

MAX_LENGTH = 2000  # letters of an error's message


def encode_error(error: Exception, rank: int) -> str:
    """Return an error of this rank as text. An exception that is no AvcilError is a bug, and names its rank."""
    is_typed = isinstance(error, AvcilError)
    kind = type(error).__name__ if is_typed else ""
    text = str(error) if is_typed else f"rank {rank} failed: {type(error).__name__}: {error}; its log has the traceback"
    return json.dumps([kind, _one_line(text)])


def decode_error(text: str) -> AvcilError:
    """Return the error of `encode_error`; a RankError for a type that does not exist and for any other text."""
    try:
        kind, message = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        kind, message = None, None
    if not (isinstance(kind, str) and isinstance(message, str)):
        return RankError("another rank, or another program at the ranks' port, sent an error that cannot be read")
    error: Any = getattr(errors, kind, None) if kind else None
    if not (isinstance(error, type) and issubclass(error, AvcilError)):
        error = RankError
    made: AvcilError = error(_one_line(message))
    return made


def _one_line(text: str) -> str:
    """Return a text without line breaks and control characters, cut to the bound."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}…"
