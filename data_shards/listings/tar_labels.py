"""Class and split of a sample in a tar of others: from its `json`, `cls` or `txt`."""

from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue

from avcil_dist import storage
from avcil_dist.data.shard import Split
from avcil_dist.errors import DataError
from data_shards.listings.listing import clean_label

MAX_BYTES = 4 << 20  # of the metadata of one clip
SPLIT_WORDS: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_json(content: bytes, where: str) -> dict[str, Any]:
    """The object of a `json` member. Raises DataError for anything else."""
    if len(content) > MAX_BYTES:
        raise DataError(f"{where}: cannot be read (larger than {MAX_BYTES} bytes)")
    values: dict[str, Any] = storage.parse_json(content, dict[str, JsonValue], "an object with fields", where)
    return values


def label_of_text(content: bytes, classes: Sequence[str], where: str) -> str:
    """The class of a `cls` or `txt` member. `classes` are the names of class numbers, counted from 0."""
    try:
        label = clean_label(content.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: cannot be read ({error})") from None
    if not (label.isascii() and label.isdigit()):
        return label
    return _numbered(int(label), classes, where) if classes else f"class_{int(label):03d}"


def label_of_value(value: Any, classes: Sequence[str], where: str) -> str:
    """The class that a field of a `json` member has: a name, or a number from 0."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: class {str(value)[:60]!r} is neither a name nor a number; a clip has one class")
    if isinstance(value, int) and classes:
        return _numbered(value, classes, where)
    return clean_label(str(value), where)


def split_of_value(value: Any, where: str) -> Split:
    """The split that a field of a `json` member has, by any of its usual names. Raises DataError for another one."""
    if not isinstance(value, str) or value.strip() not in SPLIT_WORDS:
        raise DataError(f"{where}: split {str(value)[:60]!r} is none of train, val, test")
    return SPLIT_WORDS[value.strip()]


def _numbered(number: int, classes: Sequence[str], where: str) -> str:
    if not 0 <= number < len(classes):
        raise DataError(f"{where}: class {number}, but {len(classes)} names were given")
    return classes[number]
