"""Heads in closed form from sums over clips of fixed features: one pass over the data, no gradient, no exemplars.

The sums add up over steps and ranks, so a head equals the one on all data so far, whatever the order of classes and
steps and the number of ranks. The head of sound or pictures alone comes from the same sums, as a part of them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.config.method_options import RidgeOptions, SumsOptions
from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import ClosedFormMethod, Needs, StepContext, Targets, check_matrix
from avcil_dist.methods.feature_sums import FeatureSums, RidgeSolver, check_length
from avcil_dist.methods.losses import cross_entropy
from avcil_dist.models.anchor import token_features, with_constant
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.models.state_dict import is_finite
from avcil_dist.seeds import generator


class SumsHead(ClosedFormMethod):
    """Linear head W on the features φ of a clip, from G = Σ φφᵀ and H = Σ φyᵀ. Scores are φW."""

    has_gram = True
    entries: tuple[str, ...] = ("weights",)  # of the state, beside the sums

    Options = SumsOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.weights: Tensor | None = None
        self.sums = FeatureSums(has_gram=self.has_gram)
        self._parts: dict[str, Tensor] = {}  # heads of one modality, by its name

    @property
    def needs(self) -> Needs:
        """Fixed features."""
        if self.options.features == "network":
            return Needs(training="first step")
        return Needs(training="never", network_spec=NetworkSpec(pool=self.options.pool))

    @property
    def takes_one_modality(self) -> bool:
        """Whether φ has features of each modality. Those of a network at step 0 look at both."""
        return bool(self.options.features == "tokens")

    def begin_step(self, context: StepContext) -> None:
        """Drop the previous step's head."""
        super().begin_step(context)
        self.weights, self._parts = None, {}

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all, for the network that is trained at step 0."""
        return {"loss": cross_entropy(output.logits, targets.labels)}

    def phi(self, output: Output) -> Tensor:
        """Return φ (B, F), float32: sound, pictures, and a constant 1."""
        return with_constant(self.features(output))

    def features(self, output: Output) -> list[Tensor]:
        """Return the features (B, width) of sound and of pictures, those that are present."""
        return token_features(output.audio, output.visual, unit_length=self.options.unit_length)

    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Add these clips to the sums."""
        self.sums.add(self.phi(output), labels, self.context.num_seen)

    def statistics(self) -> list[Tensor]:
        """Return the sums of this step's clips."""
        return self.sums.of_step(self.context.num_seen)

    @abstractmethod
    def head(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> Tensor:
        """Return W (features, C) from all sums, for the features `rows` (ascending indices, the constant among them).

        None: all features.
        """

    def solve(self) -> Tensor:
        """Return (1, F, C), the only candidate."""
        return self.head(self.sums.total(), None)[None]

    def candidate_scores(self, output: Output, candidates: Tensor) -> Tensor:
        """Return φW of each candidate W."""
        return self.phi(output).double() @ candidates

    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep the best W, the first of equally good ones."""
        self.weights = candidates[int(np.argmax(accuracies)) if accuracies else 0].clone()
        self.sums.end_step()

    def scores(self, output: Output) -> Tensor:
        """Return φW; while the network of step 0 trains, its logits.

        If the output lacks a modality, W is the head of the other one.
        """
        if self.weights is None:
            return output.logits
        phi = self.phi(output).double()
        return phi @ self._weights(phi, output).to(phi.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the head."""
        assert self.weights is not None
        return {"weights": self.weights.cpu(), **self.sums.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.sums.load_state_dict({name: value for name, value in state.items() if name not in self.entries})
        self.weights, self._parts = state.get("weights"), {}

    def check_state(self, num_seen: int) -> None:
        """Check the sums and the head: names, shapes and numbers in float64."""
        if self.weights is None and not self.sums.state_dict():
            return
        weights = check_matrix("weights", self.weights, torch.float64, columns=num_seen)
        if not is_finite(weights):
            raise ValueError("it has numbers that are not finite")
        self.sums.check_state(len(weights), num_seen)

    def _weights(self, phi: Tensor, output: Output) -> Tensor:
        """The head for φ (B, width) of both modalities, or of the only one that the output has."""
        assert self.weights is not None
        size, width = len(self.weights), phi.shape[1]
        has_both = output.audio is not None and output.visual is not None
        if width >= size or has_both or not self.takes_one_modality:
            check_length(phi, self.weights)
            return self.weights
        present = "audio" if output.visual is None else "visual"
        if present not in self._parts:
            first = 0 if present == "audio" else size - width
            rows = torch.arange(first, first + width)
            rows[-1] = size - 1  # the constant
            self._parts[present] = self.head(self.sums.state_dict(), rows)
        return self._parts[present]


class RidgeHead(SumsHead):
    """Ridge regression W = (G + γI)⁻¹H, γ chosen on validation clips; optionally on a random expansion of φ."""

    entries: tuple[str, ...] = ("gamma", "weights")

    Options = RidgeOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.gammas = sorted(self.options.gammas, reverse=True)
        self.gamma: float | None = None
        self._directions: Tensor | None = None

    @property
    def needs(self) -> Needs:
        """Fixed features, and validation clips if there are several γ."""
        needs = super().needs
        return Needs(training=needs.training, network_spec=needs.network_spec, validation=len(self.options.gammas) > 1)

    @property
    def takes_one_modality(self) -> bool:
        """Whether φ has features of each modality. An expansion mixes them."""
        return super().takes_one_modality and self.options.expansion == 0

    def phi(self, output: Output) -> Tensor:
        """Return φ (B, F), float32: sound, pictures and a constant 1, expanded if the options set it."""
        phi = super().phi(output)
        if self.options.expansion == 0:
            return phi
        return F.pad(torch.relu(phi @ self.directions(phi)), (0, 1), value=1.0)

    def directions(self, phi: Tensor) -> Tensor:
        """Return the fixed random directions (columns of `phi`, expansion)."""
        if self._directions is None:
            random = generator(self.options.expansion_seed, "expansion", phi.shape[1])
            drawn = random.standard_normal((phi.shape[1], self.options.expansion), dtype=np.float32)
            self._directions = torch.from_numpy(drawn / self.spread(phi.shape[1])).to(phi.device)
        return self._directions

    def spread(self, columns: int) -> np.float32:
        """Return the divisor of standard normal directions of so many columns."""
        return np.sqrt(np.float32(columns))

    def solve(self) -> Tensor:
        """Return (candidates, F, C), one W per γ, the largest γ first, by one Cholesky factorisation each.

        A γ too small to make the sums invertible in float64 gives W = 0. Raises ConfigError if all are too small.
        """
        solver = RidgeSolver(self.sums.total())
        solutions = solver.targets.new_zeros(len(self.gammas), *solver.targets.shape)
        num_solved = 0
        for gamma, solution in zip(self.gammas, solutions, strict=True):
            solver.fill()
            if solver.factorize(gamma):
                solution.copy_(solver.solution())
                num_solved += 1
        if not num_solved:
            raise ConfigError(f"method.gammas: {self.gammas} are too small for these features; add larger ones")
        return solutions

    def head(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> Tensor:
        """Return W with the chosen γ. A principal part of an invertible G + γI is invertible."""
        assert self.gamma is not None
        solver = RidgeSolver(sums, rows)
        solver.fill()
        solver.factorize(self.gamma)
        return solver.solution()

    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep the best W and its γ; of equally good ones, the one of the largest γ."""
        super().choose(candidates, accuracies)
        self.gamma = self.gammas[int(np.argmax(accuracies)) if accuracies else 0]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, the head and its γ."""
        return {"gamma": self.gamma, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        super().load_state_dict(state)
        self.gamma = state.get("gamma")

    def check_state(self, num_seen: int) -> None:
        """Check the sums, the head and its γ."""
        super().check_state(num_seen)
        if self.weights is not None:
            self.check_ridge(len(self.weights))

    def check_ridge(self, size: int) -> None:
        """Check the ridge of a head of `size` features. Raises ValueError if it is no positive number."""
        if not isinstance(self.gamma, float) or not 0 < self.gamma < float("inf"):
            raise ValueError("gamma is no positive number")
