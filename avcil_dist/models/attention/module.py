"""Audio-guided attention over visual tokens, and how far a student's is from its teacher's.

Source: Pian et al. 2023, section 3.3, eq. 2-5 and 9-10. Attention is per channel: each of the D
channels has a softmax over positions of its own, and one over frames. How it is computed without
a map ever being written is in `attention_pass.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.models.attention.fused import Attend, AttentionPass, Side
from avcil_dist.models.attention.kernels_cpu import KEYS, NAMES, native_sweeps
from avcil_dist.models.attention.kernels_torch import Sweeps, TorchSweeps
from avcil_dist.models.outputs import Divergence

Choice = Literal["auto", "torch"]


@dataclass(frozen=True)
class TeacherView:
    """What a teacher saw of a batch's last E rows: its attention module and its own tokens.

    `audio` (E, D) and `visual` (E, T, S, D) are outputs of the teacher's encoders.
    """

    attention: "AudioGuidedAttention"
    audio: Tensor
    visual: Tensor


class _LentLinear(nn.Linear):
    """A linear map that lends its weights: at ZeRO 3 they are whole only within the call of their own module."""

    def forward(  # type: ignore[override]
        self, use: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `use` makes of weight (D, D) and bias (D,)."""
        return use(self.weight, self.bias)


class AudioGuidedAttention(nn.Module):
    """Pools visual tokens into one vector, guided by the sound.

    Under autocast, keys and matrix products are in its type; what is long is summed in float32 at
    least. Tokens may be of any floating type, whatever that of the weights.
    """

    def __init__(self, dim: int, choice: Choice = "auto") -> None:
        super().__init__()
        self.attn_audio = nn.Linear(dim, dim)
        self.attn_visual = _LentLinear(dim, dim)
        self.choice = choice

    def forward(
        self, audio: Tensor, visual: Tensor, teacher: TeacherView | None = None
    ) -> tuple[Tensor, Divergence | None]:
        """Pool tokens, and compare with a teacher where one is given.

        `audio` (B, D), `visual` (B, T, S, D). Returns pooled (B, D) and, for the last E rows that
        `teacher` covers, the divergence, each part (E,); no gradient reaches the teacher.
        """
        theirs = None if teacher is None else teacher.attention._side(teacher)
        pooled, spatial, temporal = self.attn_visual(
            partial(_attend, self._guide(audio), visual.contiguous(), theirs, self.choice)
        )
        return pooled, None if teacher is None else Divergence(spatial, temporal)

    def maps(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention itself, to look at: spatial (B, T, S, D) sums to 1 over S, temporal (B, T, D) over T."""
        guide = self._guide(audio).unsqueeze(1)
        mapped = self.attn_visual(lambda weight, bias: (F.linear(visual.to(weight.dtype), weight, bias),))[0]
        keys = torch.tanh(mapped)
        spatial = torch.softmax(keys * guide.unsqueeze(2), dim=2)
        return spatial, torch.softmax((spatial * keys).sum(2) * guide, dim=1)

    @torch.no_grad()
    def _side(self, view: TeacherView) -> Side:
        """As a teacher: its side of a comparison, with weights that stay whole, in their own type."""
        weight, bias = self.attn_visual(lambda *weights: tuple(part.clone() for part in weights))
        return Side(self._guide(view.audio), view.visual.contiguous(), weight, bias)

    def _guide(self, audio: Tensor) -> Tensor:
        guide = torch.tanh(self.attn_audio(audio))
        return guide.to(torch.promote_types(self.attn_visual.weight.dtype, torch.float32))


def _attend(
    guide: Tensor, visual: Tensor, teacher: Side | None, choice: Choice, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Pooled (B, D) and the divergences (E,); without gradient, nothing is done for its sake."""
    dtype = _dtype(weight)
    if _is_fused(choice, visual, teacher, dtype):
        return _attend_fused(guide, visual, teacher, weight, bias)
    if teacher is not None:
        teacher = replace(teacher, weight=teacher.weight.to(dtype), bias=teacher.bias.to(dtype))
    sweeps = _sweeps(choice, visual, dtype)
    if torch.is_grad_enabled():
        pooled, *divergence = Attend.apply(guide, visual, weight, bias, teacher, sweeps, dtype)
    else:
        with torch.autocast(visual.device.type, enabled=False):
            work = AttentionPass(Side(guide, visual, weight.to(dtype), bias.to(dtype)), teacher, sweeps)
            work.run()
        pooled, divergence = work.pooled, list(work.divergence)
    return pooled.to(weight.dtype), *divergence


def _is_fused(choice: Choice, visual: Tensor, teacher: Side | None, dtype: torch.dtype) -> bool:
    """Whether a GPU forms the sums in the epilogue of the keys' product; nothing else than these types and shapes."""
    if choice != "auto" or visual.device.type != "cuda" or (visual.requires_grad and torch.is_grad_enabled()):
        return False
    from avcil_dist.models.attention.fused_gpu import fits  # seconds of imports, for GPUs alone

    return fits(visual, dtype) and (teacher is None or not len(teacher.tokens) or fits(teacher.tokens, dtype))


def _attend_fused(
    guide: Tensor, visual: Tensor, teacher: Side | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    from avcil_dist.models.attention.fused_gpu import FusedAttend, FusedPass

    if torch.is_grad_enabled():
        pooled, *divergence = FusedAttend.apply(guide, visual, weight, bias, teacher)
    else:
        work = FusedPass(Side(guide, visual, weight, bias), teacher, wanted=False)
        work.run()
        pooled, divergence = work.pooled, list(work.divergence)
    return pooled.to(weight.dtype), *divergence


def _dtype(weight: Tensor) -> torch.dtype:
    """What is computed in: what autocast says, else the type of the weights."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _sweeps(choice: Choice, visual: Tensor, dtype: torch.dtype) -> Sweeps:
    """The fastest there are for the device and the types, or those of plain torch."""
    if choice == "auto" and visual.device.type == "cpu" and dtype in KEYS and visual.dtype in NAMES:
        return native_sweeps() or TorchSweeps()
    if choice == "auto" and visual.device.type == "cuda" and torch.float64 not in (dtype, visual.dtype):
        from avcil_dist.models.attention.kernels_triton import TritonSweeps  # seconds of imports, for GPUs alone

        return TritonSweeps()
    return TorchSweeps()
