"""Shares of attention and evidence on the regions of test clips that make the sound, by task and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1.000001)]  # of sums of float32 weights
Row = tuple[Share | None, ...]


@dataclass(frozen=True)
class RegionShares:
    """Rows 0 … step of three matrices, each with a column per task, as the accuracy matrix has them.

    `attention`: mean share of the attention on the region; `evidence`: that of the evidence for the clip's class, over
    the clips that have any; `with_evidence`: the fraction of those clips. None where a task has no clip with a region,
    or with evidence. `area`: mean share of the picture, the value of even maps.
    """

    attention: tuple[Row, ...]
    evidence: tuple[Row, ...]
    with_evidence: tuple[Row, ...]
    area: Share
    num_clips: Annotated[int, Field(ge=0, lt=1 << 53)]

    @classmethod
    def of_clips(cls, clips: np.ndarray, tasks: Sequence[slice], area: float) -> "RegionShares":
        """Return the shares after one step.

        `clips` (N, 3) has the label, the share of the attention, and that of the evidence, NaN for a clip without any.
        `tasks` are the head's slices.
        """
        members = [clips[(clips[:, 0] >= task.start) & (clips[:, 0] < task.stop)] for task in tasks]
        has_evidence = [np.isfinite(rows[:, 2]) for rows in members]
        return cls(
            attention=(tuple(_mean(rows[:, 1]) for rows in members),),
            evidence=(tuple(_mean(rows[has, 2]) for rows, has in zip(members, has_evidence, strict=True)),),
            with_evidence=(tuple(_mean(has) for has in has_evidence),),
            area=area,
            num_clips=len(clips),
        )

    def following(self, previous: "RegionShares | None", step: int) -> "RegionShares":
        """Return these shares of `step` behind those of the steps before it; a step without any has rows of None."""
        empty = tuple((None,) * (row + 1) for row in range(step))

        def joined(name: str) -> tuple[Row, ...]:
            return (*(getattr(previous, name) if previous else empty), *getattr(self, name))

        return RegionShares(joined("attention"), joined("evidence"), joined("with_evidence"), self.area, self.num_clips)

    def after(self, name: str) -> list[float | None]:
        """The mean over seen tasks of a matrix, by name, after each step; None where no task has a value."""
        rows: tuple[Row, ...] = getattr(self, name)
        return [_mean(np.array([value for value in row if value is not None])) for row in rows]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
