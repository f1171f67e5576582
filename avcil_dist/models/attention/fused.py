"""Attention and its divergence from a teacher's, forward and backward, in one pass over the tokens.

Two facts make it cheap. Scores are products of two tanh values, so no softmax needs a maximum, and
everything that forward returns is made of sums over positions (`sweeps.py`): with e = exp(p·a),
Z = Σe, q = Σe·p / Z and P = Σe·V / Z, the KL over positions is a'q' − a·Σe'p / Z' + log Z − log Z'.

And attention is per channel: a clip's pooled channel depends on that channel of its keys alone. So
the gradient with respect to the linear map of the keys is known up to one factor a channel, the
gradient of the clip's pooled channel, before backward is: forward forms the product with the tokens
while they are at hand, (D, D) a clip, and backward only weighs and adds. It costs two matrix
products a clip instead of three, and keeps nothing of the tokens' size. Clips that are compared with
a teacher, or whose tokens take a gradient, have several factors: their keys are kept for backward
as far as there is room, and made again beyond it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avcil_dist.models.attention.kernels_torch import Compared, Sweeps

TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # most of a tile's keys; a processor's last cache holds some tiles
PRODUCTS = 64  # that a GPU weighs, and converts, at a time
ROOM = 2  # times the bytes of the tokens: most that forward keeps for backward


@dataclass(frozen=True)
class Side:
    """One network's side: `guide` (B, D), `tokens` (B, T, S, D), and the keys' linear map in the type computed in."""

    guide: Tensor
    tokens: Tensor
    weight: Tensor
    bias: Tensor

    def rows(self, rows: slice) -> "Side":
        """The side of some clips."""
        return Side(self.guide[rows], self.tokens[rows], self.weight, self.bias)


@dataclass(frozen=True)
class Wanted:
    """Whose gradient is wanted."""

    guide: bool = False
    weights: bool = False
    tokens: bool = False


class _Tile(NamedTuple):
    """A run of clips, a teacher's rows for them or none, and how their gradient is made."""

    rows: slice
    compared: slice | None
    early: bool
    kept: bool


class _Summary(NamedTuple):
    """What a tile's sums say: Z, q, P, u (C, T, D), and the scores of frames (C, T, D) with their log-sum (C, D)."""

    total: Tensor
    key: Tensor
    token: Tensor
    weights: Tensor
    scores: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, sums: Tensor, guide: Tensor) -> "_Summary":
        """From sums of e, e·p and one more."""
        total, key, token = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        scores = key * guide.unsqueeze(1)
        exponentials = scores.exp()
        whole = exponentials.sum(1)
        return cls(total, key, token, exponentials / whole.unsqueeze(1), scores, whole.log())

    @property
    def pooled(self) -> Tensor:
        """(C, D)."""
        return (self.weights * self.token).sum(1)


@dataclass
class AttentionPass:
    """Forward over all clips; the last E have a teacher. Results, and what backward needs beside the inputs."""

    student: Side
    teacher: Side | None
    sweeps: Sweeps
    wanted: Wanted = field(default_factory=Wanted)

    def __post_init__(self) -> None:
        clips, frames, positions, dim = self.student.tokens.shape
        self._memories: dict[str, Tensor] = {}
        self.num_compared = 0 if self.teacher is None else len(self.teacher.guide)
        self.tiles = list(self._plan())
        guide = self.student.guide
        self.scale = 2.0 ** round(math.log2(frames * positions))  # so that no half precision is too coarse for a share
        self.pooled = torch.empty_like(guide)
        self.divergence = guide.new_empty(2, self.num_compared)  # spatial, temporal
        self.slopes = guide.new_empty(3 if self.wanted.guide else 0, clips, dim)  # of pooled and the two divergences

    def run(self) -> list[Tensor]:
        """Fill in the results; returns what is kept of late tiles, in their order."""
        num_early = max((tile.rows.stop for tile in self.tiles if tile.early), default=0)
        dim = self.student.guide.shape[1]
        self.products = self.student.weight.new_empty(num_early, dim, dim)
        self.bias_slopes = self.student.guide.new_empty(num_early, dim)
        kept: list[Tensor] = []
        for tile in self.tiles:
            if tile.early:
                self._run_early(tile)
            else:
                made = self.look(tile)
                kept.extend(tensor for tensor in made if tensor is not None and tile.kept)
        return kept

    def convert(self, side: Side) -> Tensor:
        """The tile's tokens in the type computed in; the next tile's take their place."""
        if side.tokens.dtype == side.weight.dtype:
            return side.tokens
        # Fresh memory for every tile would cost as much as the sweeps do.
        return self.sweeps.convert(side.tokens, self._memory("tokens", side))

    def _map(self, side: Side, tokens: Tensor, out: Tensor) -> Tensor:
        """What the keys are the tanh of, but for the bias."""
        torch.mm(tokens.flatten(0, 2), side.weight.mT, out=out.flatten(0, 2))
        return out

    def _memory(self, name: str, side: Side) -> Tensor:
        """Room for a tile's tokens in the type computed in; used again and again."""
        shape = side.tokens.shape
        if name not in self._memories or len(self._memories[name]) < shape[0]:
            self._memories[name] = torch.empty(shape, dtype=side.weight.dtype, device=side.tokens.device)
        return self._memories[name][: shape[0]]

    def _memory_of_keys(self, name: str, side: Side, kept: bool) -> Tensor:
        if kept:
            return torch.empty_like(side.tokens, dtype=side.weight.dtype)
        return self._memory(name, side)

    def look(self, tile: _Tile) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A late tile's sums and keys, the student's and the teacher's; its results are filled in."""
        store = tile.kept or tile.compared is not None
        side = self.student.rows(tile.rows)
        keys = self._map(side, self.convert(side), self._memory_of_keys("keys", side, tile.kept))
        sums = self.sweeps.attend(keys, side.bias, side.tokens, side.guide, store=store, moments=self.wanted.guide)
        summary = self._fill(tile, side, sums)
        if tile.compared is None or self.teacher is None:
            return sums, keys, None, None
        other = self.teacher.rows(tile.compared)
        other_keys = self._map(other, self.convert(other), self._memory_of_keys("teacher", other, tile.kept))
        other_sums = self.sweeps.compare(other_keys, other.bias, other.guide, keys, store=tile.kept)
        self._fill_divergence(tile, side, sums, summary, other, other_sums)
        return sums, keys, other_sums, other_keys

    def differentiate(
        self, tile: _Tile, made: tuple[Tensor, Tensor, Tensor | None, Tensor | None], gradients: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a late tile and the gradients of its pooled (C, D) and divergences (2, C).

        Returns the gradient with respect to the linear map's result (C, T, S, D), its sum over tokens
        (C, D), and the factor (C, T, D) of e in the tokens' own gradient.
        """
        (sums, keys, other_sums, other_keys), (pooled, divergence) = made, gradients
        side = self.student.rows(tile.rows)
        summary = _Summary.of(sums, side.guide)
        compared = None
        guide = side.guide.unsqueeze(1)
        of_scores, of_constant = torch.zeros_like(summary.key), torch.zeros_like(guide)
        if tile.compared is not None and self.teacher is not None:
            assert other_sums is not None
            assert other_keys is not None
            other = self.teacher.rows(tile.compared)
            theirs = _Summary.of(other_sums, other.guide)
            of_scores = divergence[1, :, None, None] * (summary.weights - theirs.weights)
            of_constant = divergence[0, :, None, None] * guide
            compared = Compared(other_keys, other.guide, of_constant / theirs.total)
        factors = _factors(summary, guide, pooled, of_scores, of_constant)
        gradient = self._memory("gradient", side)
        summed = self.sweeps.differentiate(keys, side.tokens, side.guide, factors, compared, gradient)
        return gradient, summed, summary.weights * pooled.unsqueeze(1) / summary.total

    def _run_early(self, tile: _Tile) -> None:
        side = self.student.rows(tile.rows)
        tokens = self.convert(side)
        keys = self._map(side, tokens, self._memory("keys", side))
        sums = self.sweeps.attend(keys, side.bias, side.tokens, side.guide, store=True, moments=self.wanted.guide)
        summary = self._fill(tile, side, sums)
        none = torch.zeros_like(summary.key)
        factors = _factors(summary, side.guide.unsqueeze(1), torch.full_like(side.guide, self.scale), none, none)
        self.bias_slopes[tile.rows] = self.sweeps.differentiate(keys, side.tokens, side.guide, factors, None, keys)
        torch.bmm(keys.flatten(1, 2).mT, tokens.flatten(1, 2), out=self.products[tile.rows])

    def _fill(self, tile: _Tile, side: Side, sums: Tensor) -> _Summary:
        """Pooled tokens, and their slope along the guide."""
        summary = _Summary.of(sums, side.guide)
        pooled = self.pooled[tile.rows] = summary.pooled
        if self.wanted.guide:
            slope_of_token = sums[4] / sums[0] - summary.key * summary.token
            change = slope_of_token + (summary.token - pooled.unsqueeze(1)) * _slope_of_scores(summary, side, sums)
            self.slopes[0, tile.rows] = (summary.weights * change).sum(1)
        return summary

    def _fill_divergence(
        self, tile: _Tile, side: Side, sums: Tensor, summary: _Summary, other: Side, other_sums: Tensor
    ) -> None:
        """KL over positions and over frames, and their slopes along the guide."""
        theirs = _Summary.of(other_sums, other.guide)
        crossed = theirs.token  # the mean of the student's keys under the teacher's attention
        spatial = theirs.scores - crossed * side.guide.unsqueeze(1) + summary.total.log() - theirs.total.log()
        temporal = (theirs.weights * (theirs.scores - summary.scores)).sum(1) + summary.log_sum - theirs.log_sum
        self.divergence[0, tile.compared] = spatial.sum(dim=(1, 2))
        self.divergence[1, tile.compared] = temporal.sum(1)
        if self.wanted.guide:
            self.slopes[1, tile.rows] = (summary.key - crossed).sum(1)
            change = (summary.weights - theirs.weights) * _slope_of_scores(summary, side, sums)
            self.slopes[2, tile.rows] = change.sum(1)

    def _plan(self) -> Iterator[_Tile]:
        """Tiles of clips: those with no teacher, then those with one. What they keep stays within the room there is."""
        tokens, weight = self.student.tokens, self.student.weight
        clips, frames, positions, dim = tokens.shape
        keys = frames * positions * dim * weight.element_size()
        most = max(1, TILE_BYTES[tokens.device.type] // keys)
        room = ROOM * tokens.nbytes
        may_be_early = self.wanted.weights and not self.wanted.tokens and dim <= frames * positions
        num_plain = clips - self.num_compared
        for first in range(0, num_plain, most):
            rows = slice(first, min(first + most, num_plain))
            early = may_be_early and (cost := (rows.stop - first) * dim * dim * weight.element_size()) <= room
            if not early:
                cost = (rows.stop - first) * keys
            kept = self._is_late_work and cost <= room
            room -= cost if kept else 0
            yield _Tile(rows, None, early, kept and not early)
        for first in range(num_plain, clips, most):
            rows = slice(first, min(first + most, clips))
            kept = self._is_late_work and (cost := 2 * (rows.stop - first) * keys) <= room
            room -= cost if kept else 0
            yield _Tile(rows, slice(first - num_plain, rows.stop - num_plain), False, kept)

    @property
    def _is_late_work(self) -> bool:
        return self.wanted.weights or self.wanted.tokens


def _slope_of_scores(summary: _Summary, side: Side, sums: Tensor) -> Tensor:
    """How the scores of frames change with the guide, (C, T, D)."""
    return summary.key + side.guide.unsqueeze(1) * (sums[3] / sums[0] - summary.key.square())


def _factors(summary: _Summary, guide: Tensor, pooled: Tensor, of_scores: Tensor, of_constant: Tensor) -> Tensor:
    """Factors for `Sweeps.differentiate`, (3, C, T, D), from the gradient of pooled (C, D).

    `of_scores` (C, T, D) is what the temporal divergence adds to the gradient of the scores of frames,
    `of_constant` what the spatial one adds to that of every position.
    """
    share = summary.weights * pooled.unsqueeze(1)
    of_key = guide * (of_scores + share * (summary.token - summary.pooled.unsqueeze(1)))
    of_token = guide * share
    constant = of_constant + of_key * (1 - guide * summary.key) - of_token * summary.token
    return torch.stack([constant, of_key * guide, of_token]).div_(summary.total)


class Attend(torch.autograd.Function):
    """Pooled (B, D), spatial and temporal divergence (E,), with gradient for the student's four inputs."""

    @staticmethod
    def forward(
        context: Any,
        guide: Tensor,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        teacher: Side | None,
        sweeps: Sweeps,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        """`dtype` is that of keys and matrix products; what is long is summed in the guide's."""
        needs = context.needs_input_grad
        wanted = Wanted(guide=needs[0], weights=needs[2] or needs[3], tokens=needs[1])
        with torch.autocast(tokens.device.type, enabled=False):
            work = AttentionPass(Side(guide, tokens, weight.to(dtype), bias.to(dtype)), teacher, sweeps, wanted)
            kept = work.run()
        context.save_for_backward(guide, tokens, weight, bias, work.slopes, work.products, work.bias_slopes, *kept)
        context.teacher, context.sweeps, context.wanted, context.dtype = teacher, sweeps, wanted, dtype
        return work.pooled, *work.divergence.unbind()

    @staticmethod
    @once_differentiable
    def backward(context: Any, pooled: Tensor, spatial: Tensor, temporal: Tensor) -> tuple[Tensor | None, ...]:
        """Weigh what forward made early, and make the rest."""
        guide, tokens, weight, bias, slopes, products, bias_slopes, *kept = context.saved_tensors
        wanted: Wanted = context.wanted
        divergence = torch.stack([spatial, temporal])
        with torch.autocast(tokens.device.type, enabled=False):
            side = Side(guide, tokens, weight.to(context.dtype), bias.to(context.dtype))
            work = AttentionPass(side, context.teacher, context.sweeps, wanted)
            of_guide = _along_guide(slopes, pooled, divergence) if wanted.guide else None
            share = pooled[: len(products)] / work.scale
            of_weight = torch.zeros(weight.shape, dtype=guide.dtype, device=guide.device)
            _add_weighed(of_weight, products, share)
            of_bias = (share * bias_slopes).sum(0)
            of_tokens = torch.empty_like(tokens) if wanted.tokens else None
            _add_late(work, kept, (pooled, divergence), of_weight, of_bias, of_tokens)
        return of_guide, of_tokens, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None


def _along_guide(slopes: Tensor, pooled: Tensor, divergence: Tensor) -> Tensor:
    gradient = slopes[0] * pooled
    compared = slice(len(pooled) - divergence.shape[1], None)
    gradient[compared] += (slopes[1:, compared] * divergence.unsqueeze(2)).sum(0)
    return gradient


def _add_late(
    work: AttentionPass,
    kept: list[Tensor],
    gradients: tuple[Tensor, Tensor],
    of_weight: Tensor,
    of_bias: Tensor,
    of_tokens: Tensor | None,
) -> None:
    """Add the gradients of late tiles to those of the weights, and fill in that of the tokens."""
    if not (work.wanted.weights or work.wanted.tokens):
        return
    pooled, divergence = gradients
    remaining = iter(kept)
    for tile in work.tiles:
        if tile.early:
            continue
        made = _recall(tile, remaining) if tile.kept else work.look(tile._replace(kept=True))
        of_tile = (pooled[tile.rows], divergence[:, tile.compared or slice(0)])
        of_map, summed, of_exponential = work.differentiate(tile, made, of_tile)
        side = work.student.rows(tile.rows)
        if work.wanted.weights:
            of_bias += summed.sum(0)
            _add_product(of_weight, of_map.flatten(0, 2).mT, work.convert(side).flatten(0, 2))
        if of_tokens is not None:
            direct = (made[1].to(side.guide.dtype) * side.guide[:, None, None]).exp_()
            direct.mul_(of_exponential.unsqueeze(2)).add_(of_map @ side.weight)
            of_tokens[tile.rows] = direct


def _add_weighed(total: Tensor, products: Tensor, factors: Tensor) -> None:
    """Add the products (B, D, D), row o of each times its factor (B, D)."""
    if total.device.type == "cpu":  # whose einsum would copy every row
        for product, factor in zip(products, factors, strict=True):
            total.addcmul_(product, factor.unsqueeze(1))
        return
    for some, factor in zip(products.split(PRODUCTS), factors.split(PRODUCTS), strict=True):
        total += torch.einsum("bo,boi->oi", factor, some.to(total.dtype))


def _recall(tile: _Tile, remaining: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    sums, keys = next(remaining), next(remaining)
    return (sums, keys, None, None) if tile.compared is None else (sums, keys, next(remaining), next(remaining))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, in place where the types allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
