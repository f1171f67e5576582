"""Attention and its divergence on a GPU, for half-precision tokens that need no gradient.

The function is that of `fused.py`, by few large kernels, each over the whole batch. Forward computes the keys and
reads them once; backward overwrites them with the gradient of the linear map and forms one product over all clips.
Products have the type of the tokens, so these are never converted; powers of two scale the factors against overflow.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from avcil_dist.models.attention import kernels_gpu
from avcil_dist.models.attention.fused import AttentionInputs

HALVES = (torch.float16, torch.bfloat16)
LANES = 128  # channels of a program that reads sums
EXPONENT = 14  # gradients are scaled to at most 2^14; the largest float16 is just below 2^16


class KernelTile(NamedTuple):
    """Tile of a kernel over positions: rows and channels at a time, warps of a program, rounds of loads in flight."""

    rows: int = 4
    lanes: int = 128
    warps: int = 1
    stages: int = 3

    def is_even(self, positions: int, dim: int) -> bool:
        """Whether the tile divides both sizes, so that no load needs a mask."""
        return positions % self.rows == 0 and dim % self.lanes == 0


SUM_TILE, GRADIENT_TILE = KernelTile(), KernelTile()
FAST_TANH = True  # the GPU's tanh instruction, which Triton's interpreter lacks
MAX_CHUNKS = 8  # groups of rows whose products with the tokens are formed in parallel, then added


def is_supported(tokens: Tensor, dtype: torch.dtype) -> bool:
    """Whether these kernels support `tokens` (B, T, S, D) with compute type `dtype`."""
    clips, frames, _, dim = tokens.shape
    return (
        tokens.device.type == "cuda"
        and tokens.dtype in HALVES
        and dtype in HALVES
        and dim % 64 == 0
        and clips * frames > 0
    )


def compute_sums(
    inputs: AttentionInputs, values: Tensor, *, store: bool, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys (B·T·S, D), their sums (B·T, 3 or 5, D) with `values` (B·T·S, D), and the peaks.

    With `moments` the peaks (B·T, D) are the largest |value| of a frame and channel, otherwise they are empty. Without
    `store` the content of the keys is undefined.
    """
    clips, frames, positions, dim = inputs.tokens.shape
    tokens, device = inputs.tokens.view(-1, dim), inputs.tokens.device
    halved, scale = torch.empty(dim, dim, dtype=tokens.dtype, device=device), torch.empty(dim, device=device)
    kernels_gpu.halve_weights[(dim,)](inputs.weight, halved, scale, dim, triton.next_power_of_2(dim))
    keys = torch.empty_like(tokens)
    torch.mm(tokens, halved.mT, out=keys)
    num_frames, tile = clips * frames, SUM_TILE
    sums = torch.empty(num_frames, 5 if moments else 3, dim, device=device)
    peaks = torch.empty(num_frames if moments else 0, dim, device=device)
    kernels_gpu.sum_frames[(num_frames, triton.cdiv(dim, tile.lanes))](
        keys, scale, inputs.bias, inputs.guide, values, sums, peaks, frames, positions, dim,
        store, moments, moments, FAST_TANH, tile.is_even(positions, dim), tile.rows, tile.lanes, tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip
    return keys, sums, peaks


class FusedPass:
    """Forward over all clips, of which the last E have a teacher, and backward.

    `run` fills in `pooled` (B, D), `divergence` (2, E: spatial, temporal), and what backward needs.
    """

    def __init__(self, student: AttentionInputs, teacher: AttentionInputs | None, *, needs_grad: bool) -> None:
        self.student, self.teacher, self.needs_grad = student, teacher, needs_grad
        self.clips, self.frames, self.positions, self.dim = student.tokens.shape
        self.num_with_teacher = 0 if teacher is None else len(teacher.guide)
        self.num_plain = self.clips - self.num_with_teacher
        self._lanes = (triton.cdiv(self.dim, LANES),)

    def run(self) -> None:
        """Fill in the results."""
        guide, device = self.student.guide, self.student.guide.device
        tokens = self.student.tokens.view(-1, self.dim)
        store = self.needs_grad or self.num_with_teacher > 0
        self.keys, sums, peaks = compute_sums(self.student, tokens, store=store, moments=self.needs_grad)
        self.peak = peaks.max() if self.needs_grad else peaks
        self.pooled, self.normaliser = torch.empty_like(guide), torch.empty_like(guide)
        self.slopes = guide.new_zeros(3 if self.needs_grad else 0, self.clips, self.dim)
        num_frames = self.clips * self.frames
        self.stats = torch.empty(3 if self.needs_grad else 0, num_frames, self.dim, device=device)
        self.teacher_keys = self.keys[:0]
        self.teacher_stats = torch.empty(
            2 if self.needs_grad else 0, self.num_with_teacher * self.frames, self.dim, device=device
        )
        kernels_gpu.pool_frames[(self.clips, *self._lanes)](
            sums, guide, self.pooled, self.normaliser, self.slopes, self.stats, self.frames, self.dim,
            self.needs_grad, LANES,
        )  # fmt: skip
        divergence = torch.empty(2, self.num_with_teacher, self.dim, device=device)
        if self.teacher is not None and self.num_with_teacher:
            values = self.keys[self.num_plain * self.frames * self.positions :]
            self.teacher_keys, teacher_sums, _ = compute_sums(
                self.teacher, values, store=self.needs_grad, moments=False
            )
            kernels_gpu.compare_frames[(self.num_with_teacher, *self._lanes)](
                sums, teacher_sums, guide, self.teacher.guide, self.normaliser, divergence, self.slopes,
                self.teacher_stats, self.num_plain, self.clips * self.dim, self.frames, self.dim,
                self.needs_grad, LANES,
            )  # fmt: skip
        self.divergence = divergence.sum(2)

    def differentiate(self, pooled_grad: Tensor, divergence_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients with respect to guide (B, D), weight (D, D) and bias (D,). Overwrites the keys."""
        student, num_frames = self.student, self.clips * self.frames
        tokens = student.tokens.view(-1, self.dim)
        teacher_guide = student.guide if self.teacher is None else self.teacher.guide
        guide_grad = self.slopes[0] * pooled_grad
        if self.num_with_teacher:
            guide_grad[self.num_plain :] += (self.slopes[1:, self.num_plain :] * divergence_grad.unsqueeze(2)).sum(0)
        factors, bound = torch.empty_like(self.stats), torch.empty_like(self.pooled)
        teacher_factor = torch.empty_like(self.teacher_stats[0])
        kernels_gpu.find_factors[(self.clips, *self._lanes)](
            self.stats, self.teacher_stats, student.guide, teacher_guide, self.pooled, self.normaliser, self.peak,
            pooled_grad, divergence_grad, factors, teacher_factor, bound, self.num_plain, self.num_with_teacher,
            self.num_with_teacher * self.frames * self.dim, self.frames, self.dim, LANES,
        )  # fmt: skip
        scale = _scale(bound.amax(0))
        summed, tile = torch.empty(num_frames, self.dim, device=scale.device), GRADIENT_TILE
        kernels_gpu.differentiate[(num_frames, triton.cdiv(self.dim, tile.lanes))](
            self.keys, tokens, student.guide, factors, self.teacher_keys, teacher_guide, teacher_factor, scale,
            self.keys, summed, num_frames * self.dim, self.num_plain * self.frames, self.frames, self.positions,
            self.dim, tile.is_even(self.positions, self.dim), tile.rows, tile.lanes, tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return guide_grad, chunked_product(self.keys, tokens).div_(scale.unsqueeze(1)), summed.sum(0)


def _scale(bound: Tensor) -> Tensor:
    """Return powers of two (D,) that scale values of at most `bound` (D,) to the upper part of a half's range."""
    exponent = torch.frexp(bound).exponent.clamp(-100, 128)
    return torch.ldexp(torch.ones_like(bound), EXPONENT - exponent)


def chunked_product(left: Tensor, right: Tensor, chunks: int | None = None) -> Tensor:
    """Return leftᵀ · right, (D, D) in float32, of two (rows, D): products of row groups, added in a fixed order."""
    count = min(chunks or MAX_CHUNKS, max(1, len(left) // 4096))
    rows = len(left) // count
    groups = (part[: count * rows].view(count, rows, -1) for part in (left, right))
    total = _multiply(*groups).sum(0)
    if count * rows < len(left):
        total += _multiply(left[None, count * rows :], right[None, count * rows :])[0]
    return total


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type == "cuda":
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    return left.float().mT @ right.float()  # for tests with Triton's interpreter


class FusedAttend(torch.autograd.Function):
    """Pooled (B, D), spatial and temporal divergence (E,), with gradient for guide, weight and bias."""

    @staticmethod
    def forward(
        context: Any, guide: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, teacher: AttentionInputs | None
    ) -> tuple[Tensor, ...]:
        """See `Attend`."""
        student = AttentionInputs(guide, tokens, weight, bias)
        attention = FusedPass(student, teacher, needs_grad=any(context.needs_input_grad))
        attention.run()
        context.attention = attention
        # Without detach the result would reference its own graph and never be freed.
        return attention.pooled.detach(), *attention.divergence.unbind()

    @staticmethod
    @once_differentiable
    def backward(context: Any, pooled: Tensor, spatial: Tensor, temporal: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate once. A second call raises RuntimeError: the first has overwritten the keys."""
        attention: FusedPass | None = context.attention
        if attention is None:
            raise RuntimeError(
                "second backward of the attention: the first overwrote its keys, so forward must run again"
            )
        context.attention = None
        gradients = attention.differentiate(pooled.contiguous(), torch.stack([spatial, temporal]))
        guide_grad, weight_grad, bias_grad = gradients
        student = attention.student
        return guide_grad, None, weight_grad.to(student.weight.dtype), bias_grad.to(student.bias.dtype), None
