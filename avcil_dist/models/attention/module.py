"""Audio-guided attention over visual tokens, and the divergence of a student's attention from its teacher's.

Source: Pian et al. 2023, section 3.3, eq. 2-5 and 9-10. Attention is per channel: each of the D channels has its own
softmax over positions and over frames. `docs/attention.md` derives the computation, which writes no attention map.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.models.attention.fused import Attend, AttentionInputs, AttentionPass
from avcil_dist.models.attention.kernels_cpu import KEYS, NAMES, cpu_kernels
from avcil_dist.models.attention.kernels_torch import AttentionKernels, TorchKernels
from avcil_dist.models.outputs import Divergence

Choice = Literal["auto", "torch"]


@dataclass(frozen=True)
class TeacherView:
    """Teacher's attention module and its encoders' outputs for the last E rows of a batch.

    `audio` is (E, D), `visual` (E, T, S, D).
    """

    attention: "AudioGuidedAttention"
    audio: Tensor
    visual: Tensor


class _CallbackLinear(nn.Linear):
    """nn.Linear that passes weight and bias to a callback.

    ZeRO-3 gathers parameters only during the owning module's forward.
    """

    def forward(  # type: ignore[override]
        self, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return the result of `function` for weight (D, D) and bias (D,)."""
        return function(self.weight, self.bias)


class AudioGuidedAttention(nn.Module):
    """Attention that pools visual tokens into one vector, guided by the audio embedding.

    Under autocast, keys and matrix products have its type; sums over positions and frames are in float32 at least.
    Tokens may have any floating type, independent of that of the weights.
    """

    def __init__(self, dim: int, choice: Choice = "auto") -> None:
        super().__init__()
        self.attn_audio = nn.Linear(dim, dim)
        self.attn_visual = _CallbackLinear(dim, dim)
        self.choice = choice

    def forward(
        self, audio: Tensor, visual: Tensor, teacher: TeacherView | None = None
    ) -> tuple[Tensor, Divergence | None]:
        """Pool tokens, and compute the divergence from a teacher's attention if one is given.

        `audio` (B, D), `visual` (B, T, S, D). Returns pooled (B, D) and, for the last E rows that
        `teacher` covers, the divergence, each part (E,); no gradient reaches the teacher.
        """
        inputs = None if teacher is None else teacher.attention._teacher_inputs(teacher)
        pooled, spatial, temporal = self.attn_visual(
            partial(_attend, self._guide(audio), visual.contiguous(), inputs, self.choice)
        )
        return pooled, None if teacher is None else Divergence(spatial, temporal)

    def maps(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention maps: spatial (B, T, S, D), which sums to 1 over S, and temporal (B, T, D), over T."""
        guide = self._guide(audio).unsqueeze(1)
        mapped = self.attn_visual(lambda weight, bias: (F.linear(visual.to(weight.dtype), weight, bias),))[0]
        keys = torch.tanh(mapped)
        spatial = torch.softmax(keys * guide.unsqueeze(2), dim=2)
        return spatial, torch.softmax((spatial * keys).sum(2) * guide, dim=1)

    @torch.no_grad()
    def _teacher_inputs(self, view: TeacherView) -> AttentionInputs:
        """Return the inputs of this module as a teacher. The weights are copies, which ZeRO-3 does not partition."""
        weight, bias = self.attn_visual(lambda *weights: tuple(part.clone() for part in weights))
        return AttentionInputs(self._guide(view.audio), view.visual.contiguous(), weight, bias)

    def _guide(self, audio: Tensor) -> Tensor:
        guide = torch.tanh(self.attn_audio(audio))
        return guide.to(torch.promote_types(self.attn_visual.weight.dtype, torch.float32))


def _attend(
    guide: Tensor, visual: Tensor, teacher: AttentionInputs | None, choice: Choice, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Return pooled tokens (B, D) and the divergences (E,)."""
    dtype = _compute_dtype(weight)
    if _is_fused(choice, visual, teacher, dtype):
        return _attend_fused(guide, visual, teacher, weight, bias)
    if teacher is not None:
        teacher = replace(teacher, weight=teacher.weight.to(dtype), bias=teacher.bias.to(dtype))
    kernels = _choose_kernels(choice, visual, dtype)
    if torch.is_grad_enabled():
        pooled, *divergence = Attend.apply(guide, visual, weight, bias, teacher, kernels, dtype)
    else:
        with torch.autocast(visual.device.type, enabled=False):
            student = AttentionInputs(guide, visual, weight.to(dtype), bias.to(dtype))
            attention = AttentionPass(student, teacher, kernels)
            attention.run()
        pooled, divergence = attention.pooled, list(attention.divergence)
    return pooled.to(weight.dtype), *divergence


def _is_fused(choice: Choice, visual: Tensor, teacher: AttentionInputs | None, dtype: torch.dtype) -> bool:
    """Whether `fused_gpu` computes the attention: on a GPU, for types and shapes that it supports."""
    if choice != "auto" or visual.device.type != "cuda" or (visual.requires_grad and torch.is_grad_enabled()):
        return False
    from avcil_dist.models.attention.fused_gpu import is_supported  # imports Triton, which takes seconds

    return is_supported(visual, dtype) and (
        teacher is None or not len(teacher.tokens) or is_supported(teacher.tokens, dtype)
    )


def _attend_fused(
    guide: Tensor, visual: Tensor, teacher: AttentionInputs | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    from avcil_dist.models.attention.fused_gpu import FusedAttend, FusedPass

    if torch.is_grad_enabled():
        pooled, *divergence = FusedAttend.apply(guide, visual, weight, bias, teacher)
    else:
        attention = FusedPass(AttentionInputs(guide, visual, weight, bias), teacher, needs_grad=False)
        attention.run()
        pooled, divergence = attention.pooled, list(attention.divergence)
    return pooled.to(weight.dtype), *divergence


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of autocast if that is enabled, otherwise the type of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _choose_kernels(choice: Choice, visual: Tensor, dtype: torch.dtype) -> AttentionKernels:
    """Return the fastest kernels for the device and the types; `choice` "torch" returns those of plain torch."""
    if choice == "auto" and visual.device.type == "cpu" and dtype in KEYS and visual.dtype in NAMES:
        return cpu_kernels() or TorchKernels()
    if choice == "auto" and visual.device.type == "cuda" and torch.float64 not in (dtype, visual.dtype):
        from avcil_dist.models.attention.kernels_triton import TritonKernels  # imports Triton, which takes seconds

        return TritonKernels()
    return TorchKernels()
