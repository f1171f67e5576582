"""Kernels of the attention in Triton, for types and shapes that `fused_gpu` does not support.

A program processes a range of channels of one frame, position by position. Each token is read once. Sums have a fixed
order, so a repeated call gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from avcil_dist.models.attention.kernels_torch import TeacherTerm

POSITIONS, CHANNELS = 8, 64  # that a program has in registers at a time


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    size = (1 - e) / (1 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def _keys(pointer, bias, inside):
    """Keys: tanh of the product at `pointer` plus the bias, rounded to the stored type."""
    x = tl.load(pointer, mask=inside, other=0.0).to(tl.float32) + bias
    return _tanh(x).to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _attend(
    keys,
    bias,
    tokens,
    guide,
    sums,
    stride,
    frames,
    positions,
    dim,
    STORE: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    a = tl.load(guide + row // frames * dim + c, mask=c < dim, other=0.0)
    b = tl.load(bias + c, mask=c < dim, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    key, token, square, crossed = total, total, total, total
    for first in range(0, positions, ROWS):
        s = first + tl.arange(0, ROWS)
        inside = (s[:, None] < positions) & (c[None, :] < dim)
        at = (row * positions + s[:, None]) * dim + c[None, :]
        p = _keys(keys + at, b[None, :], inside)
        if STORE:
            tl.store(keys + at, p.to(keys.dtype.element_ty), mask=inside)
        e = tl.where(inside, tl.exp(p * a[None, :]), 0.0)
        ev = e * tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
        total += e
        key += e * p
        token += ev
        if MOMENTS:
            square += e * p * p
            crossed += ev * p
    at = sums + row * dim + c
    tl.store(at, tl.sum(total, 0), mask=c < dim)
    tl.store(at + stride, tl.sum(key, 0), mask=c < dim)
    tl.store(at + 2 * stride, tl.sum(token, 0), mask=c < dim)
    if MOMENTS:
        tl.store(at + 3 * stride, tl.sum(square, 0), mask=c < dim)
        tl.store(at + 4 * stride, tl.sum(crossed, 0), mask=c < dim)


@triton.jit
def _compare(
    keys,
    bias,
    guide,
    student,
    sums,
    stride,
    frames,
    positions,
    dim,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    a = tl.load(guide + row // frames * dim + c, mask=c < dim, other=0.0)
    b = tl.load(bias + c, mask=c < dim, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    key, crossed = total, total
    for first in range(0, positions, ROWS):
        s = first + tl.arange(0, ROWS)
        inside = (s[:, None] < positions) & (c[None, :] < dim)
        at = (row * positions + s[:, None]) * dim + c[None, :]
        p = _keys(keys + at, b[None, :], inside)
        if STORE:
            tl.store(keys + at, p.to(keys.dtype.element_ty), mask=inside)
        e = tl.where(inside, tl.exp(p * a[None, :]), 0.0)
        total += e
        key += e * p
        crossed += e * tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
    at = sums + row * dim + c
    tl.store(at, tl.sum(total, 0), mask=c < dim)
    tl.store(at + stride, tl.sum(key, 0), mask=c < dim)
    tl.store(at + 2 * stride, tl.sum(crossed, 0), mask=c < dim)


@triton.jit
def _differentiate(
    keys,
    tokens,
    guide,
    factors,
    teacher_keys,
    teacher_guide,
    teacher_factor,
    out,
    sums,
    stride,
    frames,
    positions,
    dim,
    HAS_TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    clip, frame = row // frames * dim + c, row * dim + c
    a = tl.load(guide + clip, mask=c < dim, other=0.0)
    constant = tl.load(factors + frame, mask=c < dim, other=0.0)
    key_factor = tl.load(factors + stride + frame, mask=c < dim, other=0.0)
    token_factor = tl.load(factors + 2 * stride + frame, mask=c < dim, other=0.0)
    if HAS_TEACHER:
        teacher_a = tl.load(teacher_guide + clip, mask=c < dim, other=0.0)
        teacher_f = tl.load(teacher_factor + frame, mask=c < dim, other=0.0)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(0, positions, ROWS):
        s = first + tl.arange(0, ROWS)
        inside = (s[:, None] < positions) & (c[None, :] < dim)
        at = (row * positions + s[:, None]) * dim + c[None, :]
        p = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(p * a[None, :]) * (constant[None, :] + key_factor[None, :] * p + token_factor[None, :] * v)
        if HAS_TEACHER:
            teacher_p = tl.load(teacher_keys + at, mask=inside, other=0.0).to(tl.float32)
            gradient -= tl.exp(teacher_p * teacher_a[None, :]) * teacher_f[None, :]
        gradient = tl.where(inside, gradient * (1 - p * p), 0.0)
        tl.store(out + at, gradient.to(out.dtype.element_ty), mask=inside)
        total += gradient
    tl.store(sums + frame, tl.sum(total, 0), mask=c < dim)


class TritonKernels:
    """Kernels for keys and tokens of any floating type except float64; sums are float32."""

    def convert(self, tokens: Tensor, out: Tensor) -> Tensor:
        """See `AttentionKernels`."""
        return out.copy_(tokens)

    def attend(
        self, keys: Tensor, bias: Tensor, tokens: Tensor, guide: Tensor, *, store: bool, moments: bool
    ) -> Tensor:
        """See `AttentionKernels`."""
        sums, shape, grid = _layout(keys, 5 if moments else 3)
        _attend[grid](keys, bias, tokens, guide, sums, *shape, store, moments, POSITIONS, CHANNELS)
        return sums

    def compare(self, keys: Tensor, bias: Tensor, guide: Tensor, student_keys: Tensor, *, store: bool) -> Tensor:
        """See `AttentionKernels`."""
        sums, shape, grid = _layout(keys, 3)
        _compare[grid](keys, bias, guide, student_keys, sums, *shape, store, POSITIONS, CHANNELS)
        return sums

    def differentiate(
        self,
        keys: Tensor,
        tokens: Tensor,
        guide: Tensor,
        factors: Tensor,
        teacher_term: TeacherTerm | None,
        out: Tensor,
    ) -> Tensor:
        """See `AttentionKernels`."""
        sums, shape, grid = _layout(keys, 1)
        terms = teacher_term or (keys, guide, guide)  # not read without a teacher
        arguments = (keys, tokens, guide, factors, *terms, out, sums, *shape)
        _differentiate[grid](*arguments, teacher_term is not None, POSITIONS, CHANNELS)
        return sums[0].sum(1)


def _layout(keys: Tensor, count: int) -> tuple[Tensor, tuple[int, ...], tuple[int, int]]:
    """Allocate sums (count, C, T, D); return them with the kernels' size arguments and the grid of programs."""
    clips, frames, positions, dim = keys.shape
    sums = torch.empty(count, clips, frames, dim, device=keys.device)
    return sums, (clips * frames * dim, frames, positions, dim), (clips * frames, triton.cdiv(dim, CHANNELS))
