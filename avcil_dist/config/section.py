"""Building blocks of the schema: the base class of sections, checks of every value, and the classes of change.

A class of change is the effect that a change of a setting has on the results of a stream. A field carries
its class as a marker of its type: `lr: Fork[float] = Field(...)`.
"""

import os.path
import unicodedata
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from avcil_dist.errors import ConfigError
from avcil_dist.storage import check_url
from avcil_dist.text.redaction import has_secret

T = TypeVar("T")
MAX_CHARACTERS = 4096  # of a text; also the longest path of Linux
MAX_INTEGER, MAX_NUMBER = 2**63 - 1, 1e30  # beyond that, 64-bit integers and float32 overflow


class ChangeClass(StrEnum):
    """The effect of a changed setting on the results of a stream."""

    OPERATIONAL = "operational"  # how and where a stream runs; the results are comparable
    FORK = "fork"  # other results: the changed stream is another stream
    INCOMPARABLE = "incomparable"  # results of the steps before and after the change cannot be compared


Operational = Annotated[T, ChangeClass.OPERATIONAL]
Fork = Annotated[T, ChangeClass.FORK]
Incomparable = Annotated[T, ChangeClass.INCOMPARABLE]


class ShellLines:
    """Marker of the only settings that a shell interprets: their text is not checked."""


def _expand_path(path: str) -> str:
    try:
        return check_url(os.path.expanduser(path))  # noqa: PTH111 - a url is no Path
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from None


PathText = Annotated[str, AfterValidator(_expand_path)]
"""A path or url. `~` becomes the home folder here, when the configuration is read, and nowhere else."""


class Section(BaseModel):
    """Section of the configuration. Unknown keys are errors; values are immutable.

    Every text is refused that has control characters, which could end a line of a script or of a log, or a secret,
    which would be stored with each stream. Numbers are finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_values(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if not any(marker is ShellLines for marker in field.metadata):
            for plain in _plain_values(value):
                _check_plain(plain)
        return value


def _check_plain(value: Any) -> None:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError("an integer of more than 64 bits")
    if isinstance(value, float) and abs(value) > MAX_NUMBER:
        raise ValueError(f"more than {MAX_NUMBER:g}")
    if not isinstance(value, str):
        return
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"{len(value)} characters, at most {MAX_CHARACTERS} are allowed")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value):
        raise ValueError("a line break, another control character, or text that is not UTF-8; remove it")
    if has_secret(value):
        raise ValueError(
            "no user or password here; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the variables of "
            "the storage, in the environment"
        )


def _plain_values(value: Any) -> Iterator[Any]:
    """Yield the values in lists and mappings, and the keys of mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _plain_values(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _plain_values(inner)
    else:
        yield value
