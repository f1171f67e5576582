"""Attention and its divergence from a teacher's attention, forward and backward, tile by tile, without attention maps.

The formulas and their derivation are in `docs/attention.md`; names and letters here are those of that document.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avcil_dist.models.attention.kernels_torch import AttentionKernels, TeacherTerm
from avcil_dist.models.attention.softmax_statistics import SoftmaxStatistics

TILE_BYTES = {
    "cpu": 4 << 20,
    "cuda": 256 << 20,
}  # maximum for the keys of a tile; the last-level cache holds some tiles
PRODUCTS_PER_CHUNK = 64  # products that a GPU converts and weights at a time
SAVED_TO_TOKENS = 2  # maximum of the bytes saved for backward, relative to those of the tokens


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of one network's attention.

    `guide` (B, D), `tokens` (B, T, S, D), and the linear map of the keys, `weight` (D, D) and `bias` (D,).
    """

    guide: Tensor
    tokens: Tensor
    weight: Tensor
    bias: Tensor

    def rows(self, rows: slice) -> "AttentionInputs":
        """Return the inputs of some clips."""
        return AttentionInputs(self.guide[rows], self.tokens[rows], self.weight, self.bias)


@dataclass(frozen=True)
class NeedsGrad:
    """Inputs that need a gradient; `weights` are weight and bias."""

    guide: bool = False
    weights: bool = False
    tokens: bool = False


class _Tile(NamedTuple):
    """Consecutive clips, with the teacher's rows for them if they have a teacher.

    `precomputed`: the gradient's product with the tokens is formed in forward. Otherwise the gradient is computed in
    backward, from `saved` keys or from recomputed ones.
    """

    rows: slice
    teacher_rows: slice | None
    precomputed: bool
    saved: bool


class _TileSums(NamedTuple):
    """Sums and keys of a tile, the student's and, if it has a teacher, the teacher's."""

    sums: Tensor
    keys: Tensor
    teacher_sums: Tensor | None = None
    teacher_keys: Tensor | None = None


@dataclass
class AttentionPass:
    """Forward over all clips, of which the last E have a teacher; backward of one tile.

    `run` fills in `pooled` (B, D), `divergence` (2, E: spatial, temporal), and what backward needs: `slopes`,
    `products`, `bias_slopes`.
    """

    student: AttentionInputs
    teacher: AttentionInputs | None
    kernels: AttentionKernels
    needs_grad: NeedsGrad = field(default_factory=NeedsGrad)

    def __post_init__(self) -> None:
        clips, frames, positions, dim = self.student.tokens.shape
        self._buffers: dict[str, Tensor] = {}
        self.num_with_teacher = 0 if self.teacher is None else len(self.teacher.guide)
        self.tiles = list(self._plan())
        guide = self.student.guide
        # Factors that are shares of T·S tokens would be too small for a half-precision type.
        self.scale = 2.0 ** round(math.log2(frames * positions))
        self.pooled = torch.empty_like(guide)
        self.divergence = guide.new_empty(2, self.num_with_teacher)
        # Derivatives of pooled and of the two divergences with respect to the guide.
        self.slopes = guide.new_empty(3 if self.needs_grad.guide else 0, clips, dim)

    def run(self) -> list[Tensor]:
        """Fill in the results. Returns the tensors that saved tiles need in backward, in the order of the tiles."""
        num_precomputed = max((tile.rows.stop for tile in self.tiles if tile.precomputed), default=0)
        dim = self.student.guide.shape[1]
        self.products = self.student.weight.new_empty(num_precomputed, dim, dim)
        self.bias_slopes = self.student.guide.new_empty(num_precomputed, dim)
        saved: list[Tensor] = []
        for tile in self.tiles:
            if tile.precomputed:
                self._precompute(tile)
            else:
                tensors = self.process_tile(tile)
                saved.extend(tensor for tensor in tensors if tensor is not None and tile.saved)
        return saved

    def convert(self, inputs: AttentionInputs) -> Tensor:
        """Return a tile's tokens in the compute type, in a buffer that the next tile overwrites."""
        if inputs.tokens.dtype == inputs.weight.dtype:
            return inputs.tokens
        # Allocating memory for every tile would take as long as the kernels do.
        return self.kernels.convert(inputs.tokens, self._buffer("tokens", inputs))

    def _map(self, inputs: AttentionInputs, tokens: Tensor, out: Tensor) -> Tensor:
        """Write W·V to `out`; the kernels add the bias."""
        torch.mm(tokens.flatten(0, 2), inputs.weight.mT, out=out.flatten(0, 2))
        return out

    def _buffer(self, name: str, inputs: AttentionInputs) -> Tensor:
        """Return a buffer for a tensor of a tile's shape in the compute type; all tiles share it."""
        shape = inputs.tokens.shape
        if name not in self._buffers or len(self._buffers[name]) < shape[0]:
            self._buffers[name] = torch.empty(shape, dtype=inputs.weight.dtype, device=inputs.tokens.device)
        return self._buffers[name][: shape[0]]

    def _key_buffer(self, name: str, inputs: AttentionInputs, saved: bool) -> Tensor:
        if saved:
            return torch.empty_like(inputs.tokens, dtype=inputs.weight.dtype)
        return self._buffer(name, inputs)

    def process_tile(self, tile: _Tile) -> _TileSums:
        """Compute sums and keys of a tile that is not precomputed, and fill in its results."""
        store = tile.saved or tile.teacher_rows is not None
        student = self.student.rows(tile.rows)
        keys = self._map(student, self.convert(student), self._key_buffer("keys", student, tile.saved))
        sums = self.kernels.attend(
            keys, student.bias, student.tokens, student.guide, store=store, moments=self.needs_grad.guide
        )
        statistics = self._fill_pooled(tile, student, sums)
        if tile.teacher_rows is None or self.teacher is None:
            return _TileSums(sums, keys)
        teacher = self.teacher.rows(tile.teacher_rows)
        teacher_keys = self._map(teacher, self.convert(teacher), self._key_buffer("teacher", teacher, tile.saved))
        teacher_sums = self.kernels.compare(teacher_keys, teacher.bias, teacher.guide, keys, store=tile.saved)
        self._fill_divergence(tile, student, sums, statistics, teacher, teacher_sums)
        return _TileSums(sums, keys, teacher_sums, teacher_keys)

    def differentiate(
        self, tile: _Tile, tile_sums: _TileSums, gradients: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate a tile that is not precomputed; `gradients` are of pooled (C, D) and the divergences (2, C).

        Returns the gradient with respect to the linear map's result (C, T, S, D), its sum over tokens
        (C, D), and the factor (C, T, D) of e in the tokens' own gradient.
        """
        (sums, keys, teacher_sums, teacher_keys), (pooled, divergence) = tile_sums, gradients
        student = self.student.rows(tile.rows)
        statistics = SoftmaxStatistics.of(sums, student.guide)
        teacher_term = None
        guide = student.guide.unsqueeze(1)
        score_term, constant_term = torch.zeros_like(statistics.key), torch.zeros_like(guide)
        if tile.teacher_rows is not None and self.teacher is not None:
            assert teacher_sums is not None
            assert teacher_keys is not None
            teacher = self.teacher.rows(tile.teacher_rows)
            of_teacher = SoftmaxStatistics.of(teacher_sums, teacher.guide)
            score_term = divergence[1, :, None, None] * (statistics.weights - of_teacher.weights)
            constant_term = divergence[0, :, None, None] * guide
            teacher_term = TeacherTerm(teacher_keys, teacher.guide, constant_term / of_teacher.total)
        factors = statistics.factors(guide, pooled, score_term, constant_term)
        gradient = self._buffer("gradient", student)
        summed = self.kernels.differentiate(keys, student.tokens, student.guide, factors, teacher_term, gradient)
        return gradient, summed, statistics.weights * pooled.unsqueeze(1) / statistics.total

    def _precompute(self, tile: _Tile) -> None:
        """Fill in a tile's results, and its gradient's product with the tokens for a gradient of pooled of `scale`."""
        student = self.student.rows(tile.rows)
        tokens = self.convert(student)
        keys = self._map(student, tokens, self._buffer("keys", student))
        sums = self.kernels.attend(
            keys, student.bias, student.tokens, student.guide, store=True, moments=self.needs_grad.guide
        )
        statistics = self._fill_pooled(tile, student, sums)
        zeros = torch.zeros_like(statistics.key)
        pooled_gradient = torch.full_like(student.guide, self.scale)
        factors = statistics.factors(student.guide.unsqueeze(1), pooled_gradient, zeros, zeros)
        self.bias_slopes[tile.rows] = self.kernels.differentiate(
            keys, student.tokens, student.guide, factors, None, keys
        )
        torch.bmm(keys.flatten(1, 2).mT, tokens.flatten(1, 2), out=self.products[tile.rows])

    def _fill_pooled(self, tile: _Tile, student: AttentionInputs, sums: Tensor) -> SoftmaxStatistics:
        """Fill in the pooled tokens and their derivative with respect to the guide."""
        statistics = SoftmaxStatistics.of(sums, student.guide)
        pooled = self.pooled[tile.rows] = statistics.pooled
        if self.needs_grad.guide:
            token_slope = sums[4] / sums[0] - statistics.key * statistics.token
            score_slope = statistics.score_slope(sums, student.guide)
            change = token_slope + (statistics.token - pooled.unsqueeze(1)) * score_slope
            self.slopes[0, tile.rows] = (statistics.weights * change).sum(1)
        return statistics

    def _fill_divergence(
        self,
        tile: _Tile,
        student: AttentionInputs,
        sums: Tensor,
        statistics: SoftmaxStatistics,
        teacher: AttentionInputs,
        teacher_sums: Tensor,
    ) -> None:
        """Fill in the KL over positions and over frames, and their derivatives with respect to the guide."""
        of_teacher = SoftmaxStatistics.of(teacher_sums, teacher.guide)
        crossed = of_teacher.token  # q×: the mean of the student's keys under the teacher's attention
        spatial = (
            of_teacher.scores - crossed * student.guide.unsqueeze(1) + statistics.total.log() - of_teacher.total.log()
        )
        temporal = (of_teacher.weights * (of_teacher.scores - statistics.scores)).sum(1)
        temporal = temporal + statistics.log_sum - of_teacher.log_sum
        self.divergence[0, tile.teacher_rows] = spatial.sum(dim=(1, 2))
        self.divergence[1, tile.teacher_rows] = temporal.sum(1)
        if self.needs_grad.guide:
            self.slopes[1, tile.rows] = (statistics.key - crossed).sum(1)
            change = (statistics.weights - of_teacher.weights) * statistics.score_slope(sums, student.guide)
            self.slopes[2, tile.rows] = change.sum(1)

    def _plan(self) -> Iterator[_Tile]:
        """Yield tiles of clips without a teacher, then with one. The memory saved for backward stays within a limit."""
        tokens, weight = self.student.tokens, self.student.weight
        clips, frames, positions, dim = tokens.shape
        key_bytes = frames * positions * dim * weight.element_size()
        clips_per_tile = max(1, TILE_BYTES[tokens.device.type] // key_bytes)
        room = SAVED_TO_TOKENS * tokens.nbytes
        may_precompute = self.needs_grad.weights and not self.needs_grad.tokens and dim <= frames * positions
        num_plain = clips - self.num_with_teacher
        for first in range(0, num_plain, clips_per_tile):
            rows = slice(first, min(first + clips_per_tile, num_plain))
            cost = (rows.stop - first) * dim * dim * weight.element_size()
            precomputed = may_precompute and cost <= room
            if not precomputed:
                cost = (rows.stop - first) * key_bytes
            saved = self._needs_keys_gradient and cost <= room
            room -= cost if saved else 0
            yield _Tile(rows, None, precomputed, saved and not precomputed)
        for first in range(num_plain, clips, clips_per_tile):
            rows = slice(first, min(first + clips_per_tile, clips))
            cost = 2 * (rows.stop - first) * key_bytes  # of student and teacher
            saved = self._needs_keys_gradient and cost <= room
            room -= cost if saved else 0
            yield _Tile(rows, slice(first - num_plain, rows.stop - num_plain), False, saved)

    @property
    def _needs_keys_gradient(self) -> bool:
        return self.needs_grad.weights or self.needs_grad.tokens


class Attend(torch.autograd.Function):
    """Pooled tokens (B, D), spatial and temporal divergence (E,), with gradient for the student's four inputs."""

    @staticmethod
    def forward(
        context: Any,
        guide: Tensor,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        teacher: AttentionInputs | None,
        kernels: AttentionKernels,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        """`dtype` is the compute type, of keys and matrix products; long sums are in the guide's type."""
        needs = context.needs_input_grad
        needs_grad = NeedsGrad(guide=needs[0], weights=needs[2] or needs[3], tokens=needs[1])
        with torch.autocast(tokens.device.type, enabled=False):
            student = AttentionInputs(guide, tokens, weight.to(dtype), bias.to(dtype))
            attention = AttentionPass(student, teacher, kernels, needs_grad)
            saved = attention.run()
        intermediate = attention.slopes, attention.products, attention.bias_slopes
        context.save_for_backward(guide, tokens, weight, bias, *intermediate, *saved)
        context.teacher, context.kernels, context.needs_grad, context.dtype = teacher, kernels, needs_grad, dtype
        return attention.pooled, *attention.divergence.unbind()

    @staticmethod
    @once_differentiable
    def backward(context: Any, pooled: Tensor, spatial: Tensor, temporal: Tensor) -> tuple[Tensor | None, ...]:
        """Weight the precomputed products, and differentiate the other tiles."""
        guide, tokens, weight, bias, slopes, products, bias_slopes, *saved = context.saved_tensors
        needs_grad: NeedsGrad = context.needs_grad
        divergence = torch.stack([spatial, temporal])
        with torch.autocast(tokens.device.type, enabled=False):
            student = AttentionInputs(guide, tokens, weight.to(context.dtype), bias.to(context.dtype))
            attention = AttentionPass(student, context.teacher, context.kernels, needs_grad)
            guide_grad = _guide_gradient(slopes, pooled, divergence) if needs_grad.guide else None
            share = pooled[: len(products)] / attention.scale
            weight_grad = torch.zeros(weight.shape, dtype=guide.dtype, device=guide.device)
            _add_weighted(weight_grad, products, share)
            bias_grad = (share * bias_slopes).sum(0)
            tokens_grad = torch.empty_like(tokens) if needs_grad.tokens else None
            _add_tiles(attention, saved, (pooled, divergence), weight_grad, bias_grad, tokens_grad)
        return guide_grad, tokens_grad, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype), None, None, None


def _guide_gradient(slopes: Tensor, pooled: Tensor, divergence: Tensor) -> Tensor:
    gradient = slopes[0] * pooled
    with_teacher = slice(len(pooled) - divergence.shape[1], None)
    gradient[with_teacher] += (slopes[1:, with_teacher] * divergence.unsqueeze(2)).sum(0)
    return gradient


def _add_tiles(
    attention: AttentionPass,
    saved: list[Tensor],
    gradients: tuple[Tensor, Tensor],
    weight_grad: Tensor,
    bias_grad: Tensor,
    tokens_grad: Tensor | None,
) -> None:
    """Add the gradients of tiles that are not precomputed to those of the weights, and fill in the tokens' gradient."""
    if not (attention.needs_grad.weights or attention.needs_grad.tokens):
        return
    pooled, divergence = gradients
    remaining = iter(saved)
    for tile in attention.tiles:
        if tile.precomputed:
            continue
        tile_sums = _load(tile, remaining) if tile.saved else attention.process_tile(tile._replace(saved=True))
        tile_gradients = (pooled[tile.rows], divergence[:, tile.teacher_rows or slice(0)])
        map_grad, summed, exponential_factor = attention.differentiate(tile, tile_sums, tile_gradients)
        student = attention.student.rows(tile.rows)
        if attention.needs_grad.weights:
            bias_grad += summed.sum(0)
            _add_product(weight_grad, map_grad.flatten(0, 2).mT, attention.convert(student).flatten(0, 2))
        if tokens_grad is not None:
            direct = (tile_sums.keys.to(student.guide.dtype) * student.guide[:, None, None]).exp_()
            direct.mul_(exponential_factor.unsqueeze(2)).add_(map_grad @ student.weight)
            tokens_grad[tile.rows] = direct


def _add_weighted(total: Tensor, products: Tensor, factors: Tensor) -> None:
    """Add the products (B, D, D), row o of each times its factor (B, D)."""
    if total.device.type == "cpu":  # einsum would copy every row there
        for product, factor in zip(products, factors, strict=True):
            total.addcmul_(product, factor.unsqueeze(1))
        return
    chunks = zip(products.split(PRODUCTS_PER_CHUNK), factors.split(PRODUCTS_PER_CHUNK), strict=True)
    for chunk, factor in chunks:
        total += torch.einsum("bo,boi->oi", factor, chunk.to(total.dtype))


def _load(tile: _Tile, saved: Iterator[Tensor]) -> _TileSums:
    """Take the saved tensors of a tile."""
    sums, keys = next(saved), next(saved)
    return _TileSums(sums, keys) if tile.teacher_rows is None else _TileSums(sums, keys, next(saved), next(saved))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, in place where the types allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
