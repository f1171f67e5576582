"""Building blocks of the schema: the base class of sections, and the classes of change.

A class of change is the effect that a change of a setting has on the results of a stream. A field carries
its class as a marker of its type: `lr: Fork[float] = Field(...)`.
"""

from enum import StrEnum
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class ChangeClass(StrEnum):
    """The effect of a changed setting on the results of a stream."""

    OPERATIONAL = "operational"  # how and where a stream runs; the results are comparable
    FORK = "fork"  # other results: the changed stream is another stream
    INCOMPARABLE = "incomparable"  # results of the steps before and after the change cannot be compared


Operational = Annotated[T, ChangeClass.OPERATIONAL]
Fork = Annotated[T, ChangeClass.FORK]
Incomparable = Annotated[T, ChangeClass.INCOMPARABLE]


class Section(BaseModel):
    """Section of the configuration. Unknown keys are errors; values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
