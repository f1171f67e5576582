"""Attention and its divergence on a GPU: few large kernels, each over the whole batch.

The same function as `attention_pass.py`, for half-precision tokens that take no gradient. Forward forms the keys and
sweeps over them once; backward puts the gradient of the linear map in their place and forms one product over all
clips. Products are in the
type of the tokens, which therefore are never converted, with factors that are powers of two against overflow.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from avcil_dist.models.attention import kernels_gpu as gpu_kernels
from avcil_dist.models.attention.fused import Side

HALVES = (torch.float16, torch.bfloat16)
LANES = 128  # channels of a program that works on sums
EXPONENT = 14  # gradients are scaled to at most two to this power; a float16 ends below 2^16


class SweepTile(NamedTuple):
    """How a sweep over positions is cut: a program's rows at a time and channels, its warps, and loads ahead."""

    rows: int = 4
    lanes: int = 128
    warps: int = 1
    ahead: int = 3

    def even(self, positions: int, dim: int) -> bool:
        """Whether the cut leaves no rest."""
        return positions % self.rows == 0 and dim % self.lanes == 0


SUM_TILE, GRADIENT_TILE = SweepTile(), SweepTile()
FAST = True  # the processor's own tanh, which Triton's interpreter lacks
CHUNKS = 8  # groups of rows, at most, whose products with the tokens are formed at once, then added up


def fits(tokens: Tensor, dtype: torch.dtype) -> bool:
    """Whether these kernels take `tokens` (B, T, S, D), computed in `dtype`."""
    clips, frames, _, dim = tokens.shape
    return (
        tokens.device.type == "cuda"
        and tokens.dtype in HALVES
        and dtype in HALVES
        and dim % 64 == 0
        and clips * frames > 0
    )


def look(side: Side, values: Tensor, *, store: bool, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (B·T·S, D) of a side, their sums (B·T, 3 or 5, D) with `values` (B·T·S, D), and with `moments` peaks.

    The peaks (B·T, D) are the largest |value| of a frame and channel. The keys are lost without `store`.
    """
    clips, frames, positions, dim = side.tokens.shape
    tokens, device = side.tokens.view(-1, dim), side.tokens.device
    halved, scale = torch.empty(dim, dim, dtype=tokens.dtype, device=device), torch.empty(dim, device=device)
    gpu_kernels.halve_weights[(dim,)](side.weight, halved, scale, dim, triton.next_power_of_2(dim))
    keys = torch.empty_like(tokens)
    torch.mm(tokens, halved.mT, out=keys)
    num_frames, tile = clips * frames, SUM_TILE
    sums = torch.empty(num_frames, 5 if moments else 3, dim, device=device)
    peaks = torch.empty(num_frames if moments else 0, dim, device=device)
    gpu_kernels.sum_frames[(num_frames, triton.cdiv(dim, tile.lanes))](
        keys, scale, side.bias, side.guide, values, sums, peaks, frames, positions, dim,
        store, moments, moments, FAST, tile.even(positions, dim), tile.rows, tile.lanes, tile.ahead,
        num_warps=tile.warps,
    )  # fmt: skip
    return keys, sums, peaks


class FusedPass:
    """Forward over all clips; the last E have a teacher. Results, and what backward needs beside the inputs."""

    def __init__(self, student: Side, teacher: Side | None, *, wanted: bool) -> None:
        self.student, self.teacher, self.wanted = student, teacher, wanted
        self.clips, self.frames, self.positions, self.dim = student.tokens.shape
        self.num_compared = 0 if teacher is None else len(teacher.guide)
        self.num_plain = self.clips - self.num_compared
        self._lanes = (triton.cdiv(self.dim, LANES),)

    def run(self) -> None:
        """Fill in the results."""
        guide, device = self.student.guide, self.student.guide.device
        tokens = self.student.tokens.view(-1, self.dim)
        is_kept = self.wanted or self.num_compared > 0
        self.keys, sums, peaks = look(self.student, tokens, store=is_kept, moments=self.wanted)
        self.peak = peaks.max() if self.wanted else peaks
        self.pooled, self.whole = torch.empty_like(guide), torch.empty_like(guide)
        self.slopes = guide.new_zeros(3 if self.wanted else 0, self.clips, self.dim)
        num_frames = self.clips * self.frames
        self.stats = torch.empty(3 if self.wanted else 0, num_frames, self.dim, device=device)
        self.other_keys = self.keys[:0]
        self.other_stats = torch.empty(
            2 if self.wanted else 0, self.num_compared * self.frames, self.dim, device=device
        )
        gpu_kernels.pool_frames[(self.clips, *self._lanes)](
            sums, guide, self.pooled, self.whole, self.slopes, self.stats, self.frames, self.dim, self.wanted, LANES,
        )  # fmt: skip
        divergence = torch.empty(2, self.num_compared, self.dim, device=device)
        if self.teacher is not None and self.num_compared:
            values = self.keys[self.num_plain * self.frames * self.positions :]
            self.other_keys, other_sums, _ = look(self.teacher, values, store=self.wanted, moments=False)
            gpu_kernels.compare_frames[(self.num_compared, *self._lanes)](
                sums, other_sums, guide, self.teacher.guide, self.whole, divergence, self.slopes, self.other_stats,
                self.num_plain, self.clips * self.dim, self.frames, self.dim, self.wanted, LANES,
            )  # fmt: skip
        self.divergence = divergence.sum(2)

    def differentiate(self, of_pooled: Tensor, of_divergence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients with respect to guide (B, D), weight (D, D) and bias (D,). The keys are lost."""
        student, num_frames = self.student, self.clips * self.frames
        tokens = student.tokens.view(-1, self.dim)
        other_guide = student.guide if self.teacher is None else self.teacher.guide
        of_guide = self.slopes[0] * of_pooled
        if self.num_compared:
            of_guide[self.num_plain :] += (self.slopes[1:, self.num_plain :] * of_divergence.unsqueeze(2)).sum(0)
        factors, bound = torch.empty_like(self.stats), torch.empty_like(self.pooled)
        other_factor = torch.empty_like(self.other_stats[0])
        gpu_kernels.find_factors[(self.clips, *self._lanes)](
            self.stats, self.other_stats, student.guide, other_guide, self.pooled, self.whole, self.peak,
            of_pooled, of_divergence, factors, other_factor, bound, self.num_plain, self.num_compared,
            self.num_compared * self.frames * self.dim, self.frames, self.dim, LANES,
        )  # fmt: skip
        scale = _scale(bound.amax(0))
        summed, tile = torch.empty(num_frames, self.dim, device=scale.device), GRADIENT_TILE
        gpu_kernels.differentiate[(num_frames, triton.cdiv(self.dim, tile.lanes))](
            self.keys, tokens, student.guide, factors, self.other_keys, other_guide, other_factor, scale,
            self.keys, summed, num_frames * self.dim, self.num_plain * self.frames, self.frames, self.positions,
            self.dim, tile.even(self.positions, self.dim), tile.rows, tile.lanes, tile.ahead, num_warps=tile.warps,
        )  # fmt: skip
        return of_guide, product(self.keys, tokens).div_(scale.unsqueeze(1)), summed.sum(0)


def _scale(bound: Tensor) -> Tensor:
    """Powers of two (D,) that take what is at most `bound` (D,) to the upper part of a half's range."""
    exponent = torch.frexp(bound).exponent.clamp(-100, 128)
    return torch.ldexp(torch.ones_like(bound), EXPONENT - exponent)


def product(left: Tensor, right: Tensor, chunks: int | None = None) -> Tensor:
    """leftᵀ · right, (D, D) in float32, of (rows, D) each: products of groups of rows, added up in a fixed order."""
    count = min(chunks or CHUNKS, max(1, len(left) // 4096))
    each = len(left) // count
    groups = (part[: count * each].view(count, each, -1) for part in (left, right))
    total = _multiply(*groups).sum(0)
    if count * each < len(left):
        total += _multiply(left[None, count * each :], right[None, count * each :])[0]
    return total


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type == "cuda":
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    return left.float().mT @ right.float()  # what Triton's interpreter runs beside


class FusedAttend(torch.autograd.Function):
    """Pooled (B, D), spatial and temporal divergence (E,), with gradient for guide, weight and bias."""

    @staticmethod
    def forward(
        context: Any, guide: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, teacher: Side | None
    ) -> tuple[Tensor, ...]:
        """See `Attend`."""
        work = FusedPass(Side(guide, tokens, weight, bias), teacher, wanted=any(context.needs_input_grad))
        work.run()
        context.work = work
        return work.pooled.detach(), *work.divergence.unbind()  # the result itself would hold its own graph

    @staticmethod
    @once_differentiable
    def backward(context: Any, pooled: Tensor, spatial: Tensor, temporal: Tensor) -> tuple[Tensor | None, ...]:
        """Raises RuntimeError at a second call: the first has overwritten the keys."""
        work: FusedPass | None = context.work
        if work is None:
            raise RuntimeError("the attention's backward ran before; its keys are gone, so forward must run again")
        context.work = None
        of_guide, of_weight, of_bias = work.differentiate(pooled.contiguous(), torch.stack([spatial, temporal]))
        side = work.student
        return of_guide, None, of_weight.to(side.weight.dtype), of_bias.to(side.bias.dtype), None
