"""Kernels of the attention in plain torch, and the protocol that the kernels of every device follow.

Notation, with the derivation, in `docs/attention.md`. A tile is C clips of (T, S, D) tokens V: T frames, S positions,
D channels. Its keys p = tanh(W·V + b), its guide a (C, D), and e = exp(p·a). All sums are in float32 at least.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TeacherTerm(NamedTuple):
    """Teacher's part of a tile's gradient: its keys (C, T, S, D), guide (C, D) and factor f' (C, T, D)."""

    keys: Tensor
    guide: Tensor
    factor: Tensor


class AttentionKernels(Protocol):
    """Kernels that a device provides. All tensors are contiguous; sums over positions are (…, C, T, D)."""

    def convert(self, tokens: Tensor, out: Tensor) -> Tensor:
        """Convert the tokens to the type of `out`; return `out`."""

    def attend(
        self, keys: Tensor, bias: Tensor, tokens: Tensor, guide: Tensor, *, store: bool, moments: bool
    ) -> Tensor:
        """Return the sums of e, e·p and e·V; with `moments` also of e·p² and e·p·V.

        `keys` contains W·V; with `store` it is overwritten by p = tanh(W·V + bias), otherwise its content is undefined
        afterwards. `bias` is (D,).
        """

    def compare(self, keys: Tensor, bias: Tensor, guide: Tensor, student_keys: Tensor, *, store: bool) -> Tensor:
        """Return a teacher's sums of e', e'·p' and e'·p, where p are the student's keys. `keys` as in `attend`."""

    def differentiate(
        self,
        keys: Tensor,
        tokens: Tensor,
        guide: Tensor,
        factors: Tensor,
        teacher_term: TeacherTerm | None,
        out: Tensor,
    ) -> Tensor:
        """Write the gradient with respect to W·V + b: (1 − p²)·(e·(f₀ + f₁·p + f₂·V) − f'·e').

        `factors` is f, (3, C, T, D). `out` may be `keys`. Returns the sum of the gradient over tokens, (C, D).
        """


class TorchKernels:
    """Kernels for any device and any floating type."""

    def convert(self, tokens: Tensor, out: Tensor) -> Tensor:
        """See `AttentionKernels`."""
        return out.copy_(tokens)

    def attend(
        self, keys: Tensor, bias: Tensor, tokens: Tensor, guide: Tensor, *, store: bool, moments: bool
    ) -> Tensor:
        """See `AttentionKernels`."""
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
        """See `AttentionKernels`."""
        p = keys.add_(bias).tanh_().to(guide.dtype)
        e = (p * guide[:, None, None]).exp_()
        return torch.stack([e.sum(2), (e * p).sum(2), e.mul_(student_keys).sum(2)])

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
        p = keys.to(guide.dtype)
        constant, key_factor, token_factor = factors.unsqueeze(3)
        gradient = (tokens * token_factor).addcmul_(p, key_factor).add_(constant)
        gradient.mul_((p * guide[:, None, None]).exp_())
        if teacher_term is not None:
            e = (teacher_term.keys.to(guide.dtype) * teacher_term.guide[:, None, None]).exp_()
            gradient.addcmul_(e, teacher_term.factor.unsqueeze(2), value=-1)
        gradient.mul_(1 - p * p)
        out.copy_(gradient)
        return gradient.sum(dim=(1, 2))
