"""Network outputs. With `network_spec.py`, all that methods import from the models.

The classes are tuples, because DeepSpeed finds a module's output tensors only in tuples, lists and dicts. All functions
on outputs go through `Output.merge`, so a new field needs one line here, and a producer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Merge = Callable[[tuple[Tensor, ...]], Tensor]


class Divergence(NamedTuple):
    """Divergence of the student's visual attention from the teacher's, per exemplar (Pian et al. 2023, eq. 9-10).

    `spatial` (E,): sum over frames and channels of KL(teacher ‖ student) over positions.
    `temporal` (E,): sum over channels of KL(teacher ‖ student) over frames.
    """

    spatial: Tensor
    temporal: Tensor


class Encoded(NamedTuple):
    """Inputs `visual` and `audio` of a network, and its encodings of them.

    `tokens` (B, T, S, D) and `sound` (B, D); None without the modality.
    """

    visual: Tensor
    audio: Tensor
    tokens: Tensor | None
    sound: Tensor | None


class Output(NamedTuple):
    """Output of a network of dimension D with C classes for a batch of B clips.

    `logits` (B, C); `audio` (B, D) and `visual` (B, D) are the projected features f_a and f_v; `pooled` (B, D) are
    the visual tokens pooled by the attention. A network of one modality has no features of the other. `divergence`
    covers the E rows with a teacher, the last of the batch. `importance` (B, M) is a teacher's: the norm of its
    loss's gradient with respect to each of `features()`. In a network of k branches, `audio` and `visual` are (B, kD),
    and `auxiliary` (B, 1 + new classes) are the logits of the newest branch alone. In a network with a booster,
    `auxiliary` (B, 2C) are the logits of the booster's two heads, in training. An extension may put numbers of its own
    there (B, any), for the method's loss.
    """

    logits: Tensor
    audio: Tensor | None = None
    visual: Tensor | None = None
    pooled: Tensor | None = None
    divergence: Divergence | None = None
    importance: Tensor | None = None
    auxiliary: Tensor | None = None

    @property
    def feature(self) -> Tensor:
        """Input of the head (B, D): f_a + f_v, or the one that is present."""
        return sum_present(self.audio, self.visual)

    @property
    def modalities(self) -> tuple[Tensor, Tensor]:
        """f_a and f_v. Raises ValueError for a network of one modality."""
        if self.audio is None or self.visual is None:
            raise ValueError("the network has one modality; this needs sound and pictures")
        return self.audio, self.visual

    def features(self) -> list[Tensor]:
        """Features that are present, in the order pooled visual, f_a, f_v."""
        return [feature for feature in (self.pooled, self.audio, self.visual) if feature is not None]

    def tensors(self) -> list[Tensor]:
        """All tensors that are present, in the order of the fields."""
        found: list[Tensor] = []
        for field in self:
            found.extend(field if isinstance(field, Divergence) else () if field is None else (field,))
        return found

    def map(
        self, function: Callable[[Tensor], Tensor], of_exemplars: Callable[[Tensor], Tensor] | None = None
    ) -> "Output":
        """Apply `function` to each tensor; `of_exemplars`, if given, to those with a row per exemplar."""
        of_exemplars = of_exemplars or function
        return Output.merge([self], lambda parts: function(parts[0]), lambda parts: of_exemplars(parts[0]))

    def select(self, rows: Tensor) -> "Output":
        """Return some rows (a mask or indices), without the divergence, which has rows of its own."""
        return self._replace(divergence=None).map(lambda tensor: tensor[rows])

    @staticmethod
    def cat(outputs: Sequence["Output"], num_current: int | None = None) -> "Output":
        """Concatenate the outputs of parts of a batch.

        With `num_current` each part begins with so many current rows: the current rows of all parts come first, then
        the exemplars.
        """

        def in_batch_order(parts: tuple[Tensor, ...]) -> Tensor:
            return torch.cat([*(part[:num_current] for part in parts), *(part[num_current:] for part in parts)])

        return Output.merge(outputs, in_batch_order if num_current is not None else torch.cat, torch.cat)

    @staticmethod
    def merge(outputs: Sequence["Output"], function: Merge, of_exemplars: Merge) -> "Output":
        """Merge outputs with the same fields present, field by field.

        `function` merges tensors with a row per clip, `of_exemplars` those with a row per exemplar.
        """

        def merge_field(parts: tuple[Any, ...]) -> Any:
            assert len({part is None for part in parts}) == 1, "outputs with different fields"
            if isinstance(parts[0], Divergence):
                return Divergence(*map(of_exemplars, zip(*parts, strict=True)))
            return None if parts[0] is None else function(parts)

        return Output(*map(merge_field, zip(*outputs, strict=True)))


def sum_present(audio: Tensor | None, visual: Tensor | None) -> Tensor:
    """Return the sum of two features, or the one that is present."""
    if audio is None or visual is None:
        feature = visual if audio is None else audio
        assert feature is not None
        return feature
    return audio + visual
