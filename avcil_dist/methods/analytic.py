"""Analytic learning: ridge regression on fixed features, updated from sums over clips.

It needs no gradients and no exemplars. With φ the features of a clip and y its one-hot class, G = Σ φφᵀ and
H = Σ φyᵀ over all clips so far give W = (G + D)⁻¹H: the ridge regression on all data seen, whatever the order of
classes and steps. D is γI, with γ chosen on validation clips; or it is diagonal, with a ridge for the sound and one for
each pooled visual token, from the evidence of the sums. Source of the idea: Zhuang et al. 2022 (ACIL).

Memory use in bytes, with F the length of φ, C the number of classes and K that of candidates for γ: sums and solver as
in `feature_sums.py`, and K·8FC for the candidates. At F = 10,000, C = 309 and K = 9, that is 0.9 GB and 0.22 GB of
candidates on every rank, and 1.6 GB more on the one that solves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avcil_dist.config.method_options import AnalyticOptions
from avcil_dist.methods.base import Needs
from avcil_dist.methods.evidence import evidence_ridge, factorize
from avcil_dist.methods.feature_sums import TARGETS, RidgeSolver
from avcil_dist.methods.sums_head import RidgeHead
from avcil_dist.models.outputs import Output
from avcil_dist.models.state_dict import is_finite


class Analytic(RidgeHead):
    """Ridge regression from sums over clips. The state is the sums, in float64, the head and its ridge."""

    entries = ("gamma", "ridge", "weights")

    Options = AnalyticOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.ridge: Tensor | None = None
        self._widths: list[int] = []  # of the blocks of φ, without the constant

    @property
    def _by_evidence(self) -> bool:
        return bool(self.options.gamma == "evidence")

    @property
    def needs(self) -> Needs:
        """Fixed features, and validation clips if they choose among several γ."""
        needs = super().needs
        return Needs(
            training=needs.training,
            network_spec=needs.network_spec,
            validation=needs.validation and not self._by_evidence,
        )

    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Add these clips to the sums."""
        super().accumulate(output, labels)
        self._widths = [self.options.expansion] if self.options.expansion else block_widths(output)

    def solve(self) -> Tensor:
        """Return the candidates (candidates, F, C); by evidence the only one (1, F, C + 1), the last column its ridge.

        Raises ConfigError if the sums cannot be factorised.
        """
        if not self._by_evidence:
            return super().solve()
        solver = RidgeSolver(self.sums.total())
        ends = [sum(self._widths[: number + 1]) for number in range(len(self._widths))]
        ridge = evidence_ridge(solver, [slice(end - width, end) for end, width in zip(ends, self._widths, strict=True)])
        factorize(solver, ridge)
        packed = solver.targets.new_empty(1, len(ridge), solver.targets.shape[1] + 1)
        packed[0, :, :-1], packed[0, :, -1] = solver.solution(), ridge
        return packed

    def candidate_scores(self, output: Output, candidates: Tensor) -> Tensor:
        """Return φW of each candidate W."""
        return super().candidate_scores(output, candidates[..., : self.context.num_seen])

    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep the W of the best γ, or the one of maximum evidence."""
        super().choose(candidates[..., : self.context.num_seen], accuracies)
        if self._by_evidence:
            self.gamma, self.ridge = None, candidates[0, :, -1].clone()

    def head(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> Tensor:
        """Return W for these features, with the ridge of the head of all features."""
        if self.ridge is None:
            return super().head(sums, rows)
        solver, ridge = RidgeSolver(sums, rows), self.ridge.to(sums[TARGETS].device)
        factorize(solver, ridge if rows is None else ridge[rows])
        return solver.solution()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, the head, and its γ or its ridge (F,)."""
        state = super().state_dict()
        return state if self.ridge is None else {"ridge": self.ridge.cpu(), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        super().load_state_dict(state)
        self.ridge = state.get("ridge")

    def check_ridge(self, size: int) -> None:
        """Check γ, or the ridge of each feature. Raises ValueError for numbers that are not positive."""
        if self.ridge is None:
            super().check_ridge(size)
            return
        if not isinstance(self.ridge, Tensor) or self.ridge.dtype != torch.float64 or self.ridge.shape != (size,):
            raise ValueError(f"ridge: not {size} numbers of {torch.float64}")
        if not (is_finite(self.ridge) and bool((self.ridge > 0).all())):
            raise ValueError("ridge has numbers that are not positive")


def block_widths(output: Output) -> list[int]:
    """Return the widths of the blocks of φ: the sound, and each token of `visual` (B, tokens, D) or (B, D)."""
    blocks = [] if output.audio is None else [output.audio.shape[1]]
    if output.visual is not None:
        blocks += [output.visual.shape[-1]] * (output.visual.shape[1] if output.visual.dim() == 3 else 1)
    return blocks


METHOD = Analytic
