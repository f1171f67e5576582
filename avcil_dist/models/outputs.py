"""What a network returns; with `network_spec.py` the one thing that methods know of models.

These are tuples, because DeepSpeed looks for a module's outputs in tuples, lists and dicts alone.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Divergence(NamedTuple):
    """How far the student's visual attention is from the teacher's, per clip (Pian et al. 2023, eq. 9-10).

    `spatial` (B,): sum over frames and channels of KL(teacher ‖ student) over positions.
    `temporal` (B,): sum over channels of KL(teacher ‖ student) over frames.
    """

    spatial: Tensor
    temporal: Tensor


class Output(NamedTuple):
    """A batch seen by a network of dimension D with C classes.

    `logits` (B, C); `audio` (B, D) and `visual` (B, D) are the projected features f_a and f_v,
    `pooled` (B, D) the visual tokens as the attention pooled them. A network of one modality has
    no features of the other. `divergence` covers the rows that a teacher was given for, which are
    the batch's last rows. `importance` (B, M) is a teacher's: how much its loss on a clip depends
    on each of `features()`.
    """

    logits: Tensor
    audio: Tensor | None
    visual: Tensor | None
    pooled: Tensor | None = None
    divergence: Divergence | None = None
    importance: Tensor | None = None

    @property
    def feature(self) -> Tensor:
        """What the head classifies, (B, D): f_a + f_v, or the one there is."""
        return sum_present(self.audio, self.visual)

    @property
    def modalities(self) -> tuple[Tensor, Tensor]:
        """f_a and f_v. Raises ValueError for a network of one modality."""
        if self.audio is None or self.visual is None:
            raise ValueError("this needs sound and pictures; the network has one of them")
        return self.audio, self.visual

    def select(self, chosen: Tensor) -> "Output":
        """The output of some clips (a mask or indices), without the divergence."""

        def some(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[chosen]

        return Output(
            self.logits[chosen],
            some(self.audio),
            some(self.visual),
            some(self.pooled),
            importance=some(self.importance),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Output":
        """The output with `function` of each of its tensors."""

        def changed(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else function(rows)

        divergence = self.divergence and Divergence(*map(function, self.divergence))
        return Output(
            function(self.logits),
            changed(self.audio),
            changed(self.visual),
            changed(self.pooled),
            divergence,
            changed(self.importance),
        )

    def tensors(self) -> list[Tensor]:
        """All tensors there are."""
        rows = (self.logits, self.audio, self.visual, self.pooled, self.importance, *(self.divergence or ()))
        return [tensor for tensor in rows if tensor is not None]

    def features(self) -> list[Tensor]:
        """The features there are: pooled visual, f_a, f_v."""
        return [feature for feature in (self.pooled, self.audio, self.visual) if feature is not None]


def sum_present(audio: Tensor | None, visual: Tensor | None) -> Tensor:
    """The sum of two features, or the one there is."""
    if audio is None or visual is None:
        feature = visual if audio is None else audio
        assert feature is not None
        return feature
    return audio + visual
