"""The sweeps of `sweeps.py` for a GPU, in Triton: a program a frame and a range of channels, positions in turn.

Each token is read once, and sums are taken in one fixed order, so that a repeated call gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from avcil_dist.models.attention.kernels_torch import Compared

POSITIONS, CHANNELS = 8, 64  # that a program has in its registers at a time


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    size = (1 - e) / (1 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def _keys(pointer, bias, inside):
    """The tanh of what lies there and the bias, rounded as it is kept."""
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
    other_keys,
    other_guide,
    other_factor,
    out,
    sums,
    stride,
    frames,
    positions,
    dim,
    COMPARED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    clip, frame = row // frames * dim + c, row * dim + c
    a = tl.load(guide + clip, mask=c < dim, other=0.0)
    constant = tl.load(factors + frame, mask=c < dim, other=0.0)
    of_key = tl.load(factors + stride + frame, mask=c < dim, other=0.0)
    of_token = tl.load(factors + 2 * stride + frame, mask=c < dim, other=0.0)
    if COMPARED:
        other_a = tl.load(other_guide + clip, mask=c < dim, other=0.0)
        other_f = tl.load(other_factor + frame, mask=c < dim, other=0.0)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(0, positions, ROWS):
        s = first + tl.arange(0, ROWS)
        inside = (s[:, None] < positions) & (c[None, :] < dim)
        at = (row * positions + s[:, None]) * dim + c[None, :]
        p = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(p * a[None, :]) * (constant[None, :] + of_key[None, :] * p + of_token[None, :] * v)
        if COMPARED:
            other_p = tl.load(other_keys + at, mask=inside, other=0.0).to(tl.float32)
            gradient -= tl.exp(other_p * other_a[None, :]) * other_f[None, :]
        gradient = tl.where(inside, gradient * (1 - p * p), 0.0)
        tl.store(out + at, gradient.to(out.dtype.element_ty), mask=inside)
        total += gradient
    tl.store(sums + frame, tl.sum(total, 0), mask=c < dim)


class TritonSweeps:
    """For keys and tokens of any floating type but float64; sums are float32."""

    def convert(self, tokens: Tensor, out: Tensor) -> Tensor:
        """See `Sweeps`."""
        return out.copy_(tokens)

    def attend(
        self, keys: Tensor, bias: Tensor, tokens: Tensor, guide: Tensor, *, store: bool, moments: bool
    ) -> Tensor:
        """See `Sweeps`."""
        sums, shape, grid = _layout(keys, 5 if moments else 3)
        _attend[grid](keys, bias, tokens, guide, sums, *shape, store, moments, POSITIONS, CHANNELS)
        return sums

    def compare(self, keys: Tensor, bias: Tensor, guide: Tensor, student_keys: Tensor, *, store: bool) -> Tensor:
        """See `Sweeps`."""
        sums, shape, grid = _layout(keys, 3)
        _compare[grid](keys, bias, guide, student_keys, sums, *shape, store, POSITIONS, CHANNELS)
        return sums

    def differentiate(
        self, keys: Tensor, tokens: Tensor, guide: Tensor, factors: Tensor, compared: Compared | None, out: Tensor
    ) -> Tensor:
        """See `Sweeps`."""
        sums, shape, grid = _layout(keys, 1)
        others = compared or (keys, guide, guide)  # looked at only where there is something to compare with
        arguments = (keys, tokens, guide, factors, *others, out, sums, *shape)
        _differentiate[grid](*arguments, compared is not None, POSITIONS, CHANNELS)
        return sums[0].sum(1)


def _layout(keys: Tensor, count: int) -> tuple[Tensor, tuple[int, ...], tuple[int, int]]:
    """Room for sums (count, C, T, D), the sizes that kernels take, and the grid of programs."""
    clips, frames, positions, dim = keys.shape
    sums = torch.empty(count, clips, frames, dim, device=keys.device)
    return sums, (clips * frames * dim, frames, positions, dim), (clips * frames, triton.cdiv(dim, CHANNELS))
