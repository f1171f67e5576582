"""What a network returns; the one thing that methods know of models."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """How far the student's visual attention is from the teacher's, per clip (Pian et al. 2023, eq. 9-10).

    `spatial` (B,): sum over frames and channels of KL(teacher ‖ student) over positions.
    `temporal` (B,): sum over channels of KL(teacher ‖ student) over frames.
    """

    spatial: Tensor
    temporal: Tensor


@dataclass(frozen=True)
class Output:
    """A batch seen by a network of dimension D with C classes.

    `logits` (B, C); `audio` (B, D) and `visual` (B, D) are the projected features f_a and f_v;
    `divergence` covers the rows that a teacher was given for, which are the batch's last rows.
    """

    logits: Tensor
    audio: Tensor
    visual: Tensor
    divergence: Divergence | None = None
