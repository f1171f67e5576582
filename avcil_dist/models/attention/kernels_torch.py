"""The two sweeps over visual tokens that attention and its gradient consist of, in plain torch.

A tile is C clips of (T, S, D) tokens: T frames, S positions, D channels. Its keys p are
tanh(attn_visual(tokens)), its guide a is tanh(attn_audio(audio)), (C, D). Every score σ = p·a is
within [-1, 1], so e = exp(σ) cannot overflow and no sweep looks for a maximum first. All sums are
in float32 at least. Faster sweeps, the same to rounding: `sweeps_native.py` and `sweeps_triton.py`.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Compared(NamedTuple):
    """The teacher's part of a tile's gradient: its keys (C, T, S, D), guide (C, D) and factor (C, T, D)."""

    keys: Tensor
    guide: Tensor
    factor: Tensor


class Sweeps(Protocol):
    """What a device must know; all tensors contiguous, sums (…, C, T, D) over positions."""

    def convert(self, tokens: Tensor, out: Tensor) -> Tensor:
        """The tokens in the type of `out`, which is returned."""

    def attend(
        self, keys: Tensor, bias: Tensor, tokens: Tensor, guide: Tensor, *, store: bool, moments: bool
    ) -> Tensor:
        """Sums of e, e·p and e·V; with `moments` also of e·p² and e·p·V.

        `keys` holds the linear map's result without its `bias` (D,); with `store` p takes its place,
        else its content is lost.
        """

    def compare(self, keys: Tensor, bias: Tensor, guide: Tensor, student_keys: Tensor, *, store: bool) -> Tensor:
        """A teacher's sums of e', e'·p' and e'·p, where p are the student's keys. `keys` as in `attend`."""

    def differentiate(
        self, keys: Tensor, tokens: Tensor, guide: Tensor, factors: Tensor, compared: Compared | None, out: Tensor
    ) -> Tensor:
        """The gradient with respect to the linear map's result: (1 − p²)·(e·(f₀ + f₁·p + f₂·V) − f'·e').

        `factors` is f, (3, C, T, D). Written to `out`, which may be `keys`; returns its sum over tokens, (C, D).
        """


class TorchSweeps:
    """Any device, any floating type."""

    def convert(self, tokens: Tensor, out: Tensor) -> Tensor:
        """See `Sweeps`."""
        return out.copy_(tokens)

    def attend(
        self, keys: Tensor, bias: Tensor, tokens: Tensor, guide: Tensor, *, store: bool, moments: bool
    ) -> Tensor:
        """See `Sweeps`."""
        p = keys.add_(bias).tanh_().to(guide.dtype)
        e = (p * guide[:, None, None]).exp_()
        sums = [e.sum(2)]
        weighted = e * p
        sums.append(weighted.sum(2))
        sums.append(e.mul_(tokens).sum(2))
        if moments:
            sums += [weighted.mul_(p).sum(2), e.mul_(p).sum(2)]
        return torch.stack(sums)

    def compare(self, keys: Tensor, bias: Tensor, guide: Tensor, student_keys: Tensor, *, store: bool) -> Tensor:
        """See `Sweeps`."""
        p = keys.add_(bias).tanh_().to(guide.dtype)
        e = (p * guide[:, None, None]).exp_()
        return torch.stack([e.sum(2), (e * p).sum(2), e.mul_(student_keys).sum(2)])

    def differentiate(
        self, keys: Tensor, tokens: Tensor, guide: Tensor, factors: Tensor, compared: Compared | None, out: Tensor
    ) -> Tensor:
        """See `Sweeps`."""
        p = keys.to(guide.dtype)
        constant, of_key, of_token = factors.unsqueeze(3)
        gradient = (tokens * of_token).addcmul_(p, of_key).add_(constant)
        gradient.mul_((p * guide[:, None, None]).exp_())
        if compared is not None:
            e = (compared.keys.to(guide.dtype) * compared.guide[:, None, None]).exp_()
            gradient.addcmul_(e, compared.factor.unsqueeze(2), value=-1)
        gradient.mul_(1 - p * p)
        out.copy_(gradient)
        return gradient.sum(dim=(1, 2))
