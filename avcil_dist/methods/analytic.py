"""Analytic learning: ridge regression on fixed features, updated from sums over clips.

It needs no gradients and no exemplars. With φ the features of a clip and y its one-hot class, G = Σ φφᵀ and
H = Σ φyᵀ over all clips so far give W = (G + γI)⁻¹H: the ridge regression on all data seen,
whatever the order of classes and steps. Source of the idea: Zhuang et al. 2022 (ACIL).

Memory use in bytes, with F the length of φ, C the number of classes and K that of candidates for γ: every rank holds
G as trapezoids above its diagonal, about 4F²(1 + 1024/F), once for the previous steps and once for this one, and
K·8FC for the candidates. The rank that solves also holds two whole F × F matrices, 16F². At F = 10,000, C = 309 and
K = 9, that is 0.9 GB and 0.22 GB of candidates on every rank, and 1.6 GB more on the one that solves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.config.section import Section
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.methods.base import ClosedFormMethod, Needs, StepContext, Targets, check_matrix
from avcil_dist.methods.losses import cross_entropy
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.models.state_dict import is_finite
from avcil_dist.seeds import generator

PANEL = 1024  # rows of a panel of G
ROWS = 1024  # clips per matrix product: a product of fewer is limited by memory bandwidth


class Analytic(ClosedFormMethod):
    """Ridge regression from sums over clips. The state is the sums, in float64, and the classifier."""

    class Options(Section):
        """Features, and candidates for γ."""

        features: Literal["tokens", "network"] = Field(
            "tokens",
            description="pooled tokens of the encoders (tokens), or features of a network trained at step 0 (network)",
        )
        pool: tuple[PositiveInt, PositiveInt] = Field(
            (8, 1), description="grid of frames × positions to which visual tokens are pooled"
        )
        gammas: list[PositiveFloat] = Field(
            [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6],
            min_length=1,
            description="candidates for γ; the best on validation clips is used, of equally good ones the largest",
        )
        expansion: int = Field(
            0, ge=0, le=1_000_000, description="length of a fixed random ReLU expansion of φ; 0 for none"
        )
        expansion_seed: int = Field(0, ge=0)

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.gammas = sorted(self.options.gammas, reverse=True)
        self.gamma: float | None = None
        self.weights: Tensor | None = None
        self._previous: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}
        self._collected: list[tuple[Tensor, Tensor]] = []
        self._directions: Tensor | None = None

    @property
    def needs(self) -> Needs:
        """Fixed features, and validation clips if there are several γ."""
        has_candidates = len(self.options.gammas) > 1
        if self.options.features == "network":
            return Needs(training="first step", validation=has_candidates)
        return Needs(training="never", validation=has_candidates, network_spec=NetworkSpec(pool=self.options.pool))

    def begin_step(self, context: StepContext) -> None:
        """Drop the previous step's classifier."""
        super().begin_step(context)
        self.weights = None

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all, for the network that is trained at step 0."""
        return {"loss": cross_entropy(output.logits, targets.labels)}

    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Collect clips, and add them to the sums once there are `ROWS` of them."""
        self._collected.append((self._phi(output), labels))
        if sum(len(rows) for rows, _ in self._collected) >= ROWS:
            self._add_collected()

    def statistics(self) -> list[Tensor]:
        """Return G's panels and H of this step's clips."""
        self._add_collected()
        return [self._new[name] for name in sorted(self._new)]

    def solve(self) -> Tensor:
        """Return (candidates, F, C), one W per γ, the largest γ first, by one Cholesky factorisation each.

        A γ too small to make the sums invertible in float64 gives W = 0. Raises ConfigError if all are too small.
        """
        total = self._total()
        targets = total["targets"]
        size, num_classes = targets.shape
        solutions = targets.new_zeros(len(self.gammas), size, num_classes)
        gram, info = targets.new_zeros(size, size), torch.zeros((), dtype=torch.int32, device=targets.device)
        num_solved = 0
        for gamma, solution in zip(self.gammas, solutions, strict=True):
            for name, first in _panels(size):  # overwrites the previous factor
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
        """Return φW of each candidate W."""
        return self._phi(output).double() @ candidates

    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep the best W and its γ; of equally good ones, the one of the largest γ."""
        best = int(np.argmax(accuracies)) if accuracies else 0
        self.gamma, self.weights = self.gammas[best], candidates[best].clone()
        self._previous, self._new = self._total(), {}

    def scores(self, output: Output) -> Tensor:
        """Return φW; while the network of step 0 trains, its logits."""
        if self.weights is None:
            return output.logits
        phi = self._phi(output)
        _check_length(phi, self.weights)
        return phi.double() @ self.weights.to(output.logits.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, the classifier and its γ."""
        assert self.weights is not None
        return {"gamma": self.gamma, "weights": self.weights.cpu()} | {k: v.cpu() for k, v in self._previous.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._previous = {name: value for name, value in state.items() if name not in ("gamma", "weights")}
        self.gamma, self.weights = state.get("gamma"), state.get("weights")

    def check_state(self, num_seen: int) -> None:
        """Check the sums and the classifier: names, shapes and numbers in float64."""
        if self.weights is None and not self._previous:
            return
        weights = check_matrix("weights", self.weights, torch.float64, columns=num_seen)
        if not isinstance(self.gamma, float) or not 0 < self.gamma < float("inf"):
            raise ValueError("gamma is no positive number")
        size = len(weights)
        shapes = {name: (min(PANEL, size - first), size - first) for name, first in _panels(size)}
        if self._previous.keys() != {*shapes, "targets"}:
            raise ValueError("it lacks sums, or has others")
        check_matrix("targets", self._previous["targets"], torch.float64, rows=size, columns=num_seen)
        for name, (rows, columns) in shapes.items():
            check_matrix(name, self._previous[name], torch.float64, rows=rows, columns=columns)
        if not all(is_finite(values) for values in (weights, *self._previous.values())):
            raise ValueError("it has numbers that are not finite")

    def _phi(self, output: Output) -> Tensor:
        """Return φ (B, F), float32: sound and pictures, expanded if the options set it, and a constant 1."""
        parts = [part.flatten(1).float() for part in (output.audio, output.visual) if part is not None]
        phi = F.pad(torch.cat(parts, dim=1), (0, 1), value=1.0)
        if self.options.expansion == 0:
            return phi
        if self._directions is None:
            random = generator(self.options.expansion_seed, "expansion", phi.shape[1])
            drawn = random.standard_normal((phi.shape[1], self.options.expansion), dtype=np.float32)
            self._directions = torch.from_numpy(drawn / np.sqrt(np.float32(phi.shape[1]))).to(phi.device)
        return F.pad(torch.relu(phi @ self._directions), (0, 1), value=1.0)

    def _add_collected(self) -> None:
        """Add the products of the collected clips to the sums: to H, and to each panel of G from the diagonal on."""
        if not self._collected:
            return
        phi = torch.cat([rows for rows, _ in self._collected]).double()
        labels = torch.cat([labels for _, labels in self._collected])
        self._collected = []
        if not self._new:
            if self._previous:
                _check_length(phi, self._previous["targets"])
            self._new = self._zeros(phi.shape[1], phi.device)
        for name, first in _panels(phi.shape[1]):
            self._new[name].addmm_(phi[:, first : first + PANEL].T, phi[:, first:])
        self._new["targets"].addmm_(phi.T, F.one_hot(labels, self.context.num_seen).double())

    def _zeros(self, size: int, device: torch.device) -> dict[str, Tensor]:
        shapes = {name: (min(PANEL, size - first), size - first) for name, first in _panels(size)}
        shapes["targets"] = (size, self.context.num_seen)
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def _total(self) -> dict[str, Tensor]:
        """Sums over all clips so far: those of the previous steps are added to this step's in place."""
        for name, value in self._previous.items():
            self._new[name][:, : value.shape[1]] += value.to(self._new[name].device)
        self._previous = {}
        return self._new


def _check_length(phi: Tensor, rows: Tensor) -> None:
    """Raise ArtifactError for a state of features of another length."""
    if phi.shape[1] != len(rows):
        raise ArtifactError(
            f"the state of the method is of {len(rows)} features, these are {phi.shape[1]}; run the earlier step again"
        )


def _panels(size: int) -> list[tuple[str, int]]:
    """Return names and first rows of the panels of a `size` × `size` matrix."""
    return [(f"gram_{first // PANEL:03d}", first) for first in range(0, size, PANEL)]


METHOD = Analytic
