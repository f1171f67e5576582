"""Analytic learning: a ridge regression on fixed features, kept up to date by sums over clips.

No gradient, no exemplar. With φ the features of a clip and y its one-hot class, G = Σ φφᵀ and
H = Σ φyᵀ over all clips so far give W = (G + γI)⁻¹H: the ridge regression on all data seen,
whatever the order of classes and steps. Source of the idea: Zhuang et al. 2022 (ACIL).

ExemplarMemory, in bytes, with F the length of φ, C the classes and K the candidates for γ: a rank holds G as
the trapezoids above its diagonal, about 4F²(1 + 1024/F), of the steps before and again of this one;
K·8FC for the candidates; and the rank that solves two whole F × F matrices, 16F². At F = 10,000,
C = 309, K = 9: 0.9 GB and 0.22 GB of candidates on every rank, 1.6 GB more on the one that solves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.config.section import Section
from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import ClosedFormMethod, Needs, StepContext, Targets
from avcil_dist.methods.losses import cross_entropy
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.seeds import generator

PANEL = 1024  # columns of G that are summed at a time
ROWS = 1024  # clips that are summed at a time: a product of fewer is bound by memory


class Analytic(ClosedFormMethod):
    """Ridge regression from sums. The state is the sums, in float64, and the classifier."""

    class Options(Section):
        """Which features, and which γ to try."""

        features: Literal["tokens", "network"] = Field(
            "tokens", description="pooled tokens of the encoders, or the features of a network trained at step 0"
        )
        pool: tuple[PositiveInt, PositiveInt] = Field(
            (8, 1), description="grid of frames × positions that visual tokens are pooled to"
        )
        gammas: list[PositiveFloat] = Field(
            [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6],
            min_length=1,
            description="candidates for γ; the best on validation clips is taken, of equal ones the largest",
        )
        expansion: int = Field(0, ge=0, description="length of a fixed random relu expansion of φ; 0 for none")
        expansion_seed: int = Field(0, ge=0)

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.gammas = sorted(self.options.gammas, reverse=True)
        self.gamma: float | None = None
        self.weights: Tensor | None = None
        self._before: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._directions: Tensor | None = None

    @property
    def needs(self) -> Needs:
        """Features that stay as they are."""
        chooses = len(self.options.gammas) > 1
        if self.options.features == "network":
            return Needs(training="first step", validation=chooses)
        return Needs(training="never", validation=chooses, network_spec=NetworkSpec(pool=self.options.pool))

    def begin_step(self, context: StepContext) -> None:
        """The classifier is to be solved anew."""
        super().begin_step(context)
        self.weights = None

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """CE_all, for the network that is trained at step 0."""
        return {"loss": cross_entropy(output.logits, targets.labels)}

    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Keep the clips until there are enough for a product worth its while."""
        self._waiting.append((self._phi(output), labels))
        if sum(len(rows) for rows, _ in self._waiting) >= ROWS:
            self._add_waiting()

    def statistics(self) -> list[Tensor]:
        """G's panels and H, of this step's clips."""
        self._add_waiting()
        return [self._new[name] for name in sorted(self._new)]

    def solve(self) -> Tensor:
        """(candidates, F, C): one W for each γ, largest first; one factorisation each.

        A γ too small to make the sums invertible in float64 gives W = 0. Raises ConfigError where all are.
        """
        total = self._total()
        targets = total["targets"]
        size, num_classes = targets.shape
        solutions = targets.new_zeros(len(self.gammas), size, num_classes)
        gram, info = targets.new_zeros(size, size), torch.zeros((), dtype=torch.int32, device=targets.device)
        num_solved = 0
        for gamma, solution in zip(self.gammas, solutions, strict=True):
            for name, first in _panels(size):  # the factor of the γ before lies there
                gram[first : first + PANEL, first:] = total[name]
            gram.diagonal().add_(gamma)
            torch.linalg.cholesky_ex(gram, upper=True, out=(gram, info))
            if not info.item():
                solution.copy_(torch.cholesky_solve(targets, gram, upper=True))
                num_solved += 1
        if not num_solved:
            raise ConfigError(f"method.gammas: {self.gammas} are too small for these features; add larger ones")
        return solutions

    def candidate_scores(self, output: Output, candidates: Tensor) -> Tensor:
        """φW of each W."""
        return self._phi(output).double() @ candidates

    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep the best W and its γ, of equally good ones that of the largest γ."""
        best = int(np.argmax(accuracies)) if accuracies else 0
        self.gamma, self.weights = self.gammas[best], candidates[best].clone()
        self._before, self._new = self._total(), {}

    def scores(self, output: Output) -> Tensor:
        """φW; while the network of step 0 trains, its own logits."""
        if self.weights is None:
            return output.logits
        return self._phi(output).double() @ self.weights.to(output.logits.device)

    def state_dict(self) -> dict[str, Any]:
        """The sums, the classifier and its γ."""
        assert self.weights is not None
        return {"gamma": self.gamma, "weights": self.weights.cpu()} | {k: v.cpu() for k, v in self._before.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._before = {name: value for name, value in state.items() if name not in ("gamma", "weights")}
        self.gamma, self.weights = state.get("gamma"), state.get("weights")

    def _phi(self, output: Output) -> Tensor:
        """(B, F) float32: sound and pictures side by side, expanded where the options say so, and a constant 1."""
        parts = [part.flatten(1).float() for part in (output.audio, output.visual) if part is not None]
        phi = F.pad(torch.cat(parts, dim=1), (0, 1), value=1.0)
        if self.options.expansion == 0:
            return phi
        if self._directions is None:
            random = generator(self.options.expansion_seed, "expansion", phi.shape[1])
            drawn = random.standard_normal((phi.shape[1], self.options.expansion), dtype=np.float32)
            self._directions = torch.from_numpy(drawn / np.sqrt(np.float32(phi.shape[1]))).to(phi.device)
        return F.pad(torch.relu(phi @ self._directions), (0, 1), value=1.0)

    def _add_waiting(self) -> None:
        """Add the products of the clips that wait to the sums: only what is on and right of G's diagonal panels."""
        if not self._waiting:
            return
        phi = torch.cat([rows for rows, _ in self._waiting]).double()
        labels = torch.cat([labels for _, labels in self._waiting])
        self._waiting = []
        if not self._new:
            self._new = self._zeros(phi.shape[1], phi.device)
        for name, first in _panels(phi.shape[1]):
            self._new[name].addmm_(phi[:, first : first + PANEL].T, phi[:, first:])
        self._new["targets"].addmm_(phi.T, F.one_hot(labels, self.context.num_seen).double())

    def _zeros(self, size: int, device: torch.device) -> dict[str, Tensor]:
        shapes = {name: (min(PANEL, size - first), size - first) for name, first in _panels(size)}
        shapes["targets"] = (size, self.context.num_seen)
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def _total(self) -> dict[str, Tensor]:
        """All clips' sums: this step's, with those of the steps before added in place."""
        for name, value in self._before.items():
            self._new[name][:, : value.shape[1]] += value.to(self._new[name].device)
        self._before = {}
        return self._new


def _panels(size: int) -> list[tuple[str, int]]:
    """Names and first rows of the panels of a `size` × `size` matrix."""
    return [(f"gram_{first // PANEL:03d}", first) for first in range(0, size, PANEL)]


METHOD = Analytic
