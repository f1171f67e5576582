"""Kernel ridge regression with a Gaussian (RBF) kernel per modality, on the features of all clips so far.

With v the pooled visual tokens of a clip, each of length 1, a its sound, of length 1, and m the median of the squared
distances between clips of step 0, K = w_v exp(−‖v − v'‖²/m_v) + w_a exp(−‖a − a'‖²/m_a). The scores are k(x)ᵀB + 1ᵀB
with (K + 11ᵀ + γI)B = Y, Y the one-hot classes: exact, for any order of classes and steps and any number of ranks.

The features of all training clips are kept, in float16: 2NF bytes for N clips of F numbers. Solving takes 16N² bytes
on one rank. Source: Saunders et al. 1998; a sum of kernels per modality as in Gönen and Alpaydın 2011.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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

SHORTEST = 1e-6  # length of a token that is scaled to length 1
COMPARED = 4096  # clips of step 0 whose distances have the median
ROWS = 1024  # clips whose kernel is computed at a time
MODALITIES = ("audio", "visual")


class Kernel(ClosedFormMethod):
    """Kernel ridge regression. The state is the features and labels of all clips, the medians and B."""

    gathers = True

    class Options(Section):
        """Features, kernel and limits."""

        pool: tuple[PositiveInt, PositiveInt] = Field(
            (8, 1), description="grid of frames × positions to which visual tokens are pooled"
        )
        gamma: PositiveFloat = Field(0.01, description="ridge γ")
        visual_weight: float = Field(0.7, gt=0, lt=1, description="w_v; w_a is the rest of 1")
        keep_factor: bool = Field(
            False,
            description="keep the Cholesky factor, 4N² bytes, in the artifact, so that a step only adds its rows; "
            "otherwise a step computes all of it",
        )
        max_clips: PositiveInt = Field(
            20_000, le=1_000_000, description="limit of N; solving takes 16N² bytes, 6.4 GB at 20,000"
        )

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.features: dict[str, Tensor] = {}  # (N, width), float16
        self.labels = torch.zeros(0, dtype=torch.long)
        self.medians: dict[str, float] = {}
        self.weights: Tensor | None = None  # B, (N, C)
        self._factor: dict[str, Tensor] = {}  # rows of each step, up to and with the diagonal
        self._parts: dict[str, Tensor] = {}  # B of one modality, by its name
        self._collected: list[tuple[dict[str, Tensor], Tensor]] = []

    @property
    def needs(self) -> Needs:
        """Fixed features of no more clips than the limit."""
        return Needs(
            training="never", network_spec=NetworkSpec(pool=self.options.pool), max_clips=self.options.max_clips
        )

    @property
    def takes_one_modality(self) -> bool:
        """True: there is a kernel for each."""
        return True

    def begin_step(self, context: StepContext) -> None:
        """Drop the previous step's head."""
        super().begin_step(context)
        self.weights, self._parts = None, {}

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all. Nothing is trained."""
        return {"loss": cross_entropy(output.logits, targets.labels)}

    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Collect the features of these clips."""
        self._collected.append(({name: part.half() for name, part in units(output).items()}, labels))

    def statistics(self) -> list[Tensor]:
        """Append the step's clips, which all ranks have. There is nothing to be summed."""
        parts, labels = zip(*self._collected, strict=True)
        for name in parts[0]:
            new = torch.cat([part[name] for part in parts])
            old = self.features.get(name, new[:0]).to(new.device)
            if old.shape[1] != new.shape[1]:
                raise ArtifactError(
                    f"the state of the method is of {old.shape[1]} {name} features, these are {new.shape[1]}; "
                    "run the earlier step again"
                )
            self.features[name] = torch.cat([old, new])
            self.medians.setdefault(name, median_distance(new))
        self.labels = torch.cat([self.labels.to(labels[0].device), *labels])
        self._collected = []
        return []

    def solve(self) -> Tensor:
        """Return (1, N, C), the only candidate. Raises ConfigError if the kernel is singular in float64.

        The factor of the earlier steps' rows is extended by those of this step.
        """
        done = sum(len(rows) for rows in self._factor.values())
        factor = self.labels.new_zeros((len(self.labels), len(self.labels)), dtype=torch.float64)
        first = 0
        for rows in self._factor.values():
            factor[first : first + len(rows), : rows.shape[1]] = rows
            first += len(rows)
        self._fill(factor, done)
        old, below, corner = factor[:done, :done], factor[done:, :done], factor[done:, done:]
        if done:
            below.copy_(torch.linalg.solve_triangular(old, below.T, upper=False).T)
            corner.addmm_(below, below.T, alpha=-1)
        corner.copy_(_cholesky(corner))
        if self.options.keep_factor:
            self._factor[f"factor_{self.context.step:03d}"] = factor[done:].clone()
        return torch.cholesky_solve(self._targets(), factor)[None]

    def candidate_scores(self, output: Output, candidates: Tensor) -> Tensor:
        """Return the scores by each candidate B."""
        return self._score(output, candidates)

    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep B."""
        self.weights = candidates[0]

    def scores(self, output: Output) -> Tensor:
        """Return k(x)ᵀB + 1ᵀB. If the output lacks a modality, B is solved for the kernel of the other one."""
        assert self.weights is not None
        present = [name for name in MODALITIES if getattr(output, name) is not None]
        if len(present) == len(self.features):
            return self._score(output, self.weights)
        [name] = present
        if name not in self._parts:
            matrix = self.labels.new_zeros((len(self.labels), len(self.labels)), dtype=torch.float64)
            self._fill(matrix, 0, name)
            self._parts[name] = torch.cholesky_solve(self._targets(), _cholesky(matrix))
        return self._score(output, self._parts[name])

    def state_dict(self) -> dict[str, Any]:
        """Return features, labels, medians, B, and the factor if it is kept."""
        assert self.weights is not None
        tensors = {**self.features, "labels": self.labels, "weights": self.weights, **self._factor}
        return {**{name: tensor.cpu() for name, tensor in tensors.items()}, "medians": dict(self.medians)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.features = {name: state[name] for name in MODALITIES if name in state}
        self.labels = state.get("labels", self.labels)
        self.medians = dict(state.get("medians", {}))
        self.weights, self._parts = state.get("weights"), {}
        self._factor = {name: state[name] for name in sorted(state) if name.startswith("factor_")}

    def check_state(self, num_seen: int) -> None:
        """Check features, labels, medians, B and the factor: shapes, types and numbers."""
        if self.weights is None:
            return
        count = len(check_matrix("weights", self.weights, torch.float64, columns=num_seen))
        tensors = [self.weights, *self._factor.values()]
        for name, values in self.features.items():
            tensors.append(check_matrix(name, values, torch.float16, rows=count))
        if self.features.keys() != self.medians.keys() or not all(
            isinstance(value, float) and 0 < value < float("inf") for value in self.medians.values()
        ):
            raise ValueError("medians are no positive numbers of its features")
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.dtype != torch.long or labels.shape != (count,):
            raise ValueError(f"labels: not {count} whole numbers")
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_seen:
            raise ValueError("labels of classes that are not seen")
        if self._factor:
            ends = torch.cumsum(torch.tensor([len(rows) for rows in self._factor.values()]), 0).tolist()
            for (name, rows), end in zip(self._factor.items(), ends, strict=True):
                check_matrix(name, rows, torch.float64, columns=end)
            if ends[-1] != count:
                raise ValueError(f"the factor has {ends[-1]} rows, not {count}")
        if not all(is_finite(values) for values in tensors):
            raise ValueError("it has numbers that are not finite")

    def _targets(self) -> Tensor:
        return F.one_hot(self.labels, self.context.num_seen).double()

    def _fill(self, matrix: Tensor, first: int, only: str | None = None) -> None:
        """Fill the rows from `first` on with K + 11ᵀ + γI, up to the diagonal; `only`: the kernel of one modality."""
        for start in range(first, len(matrix), ROWS):
            rows = slice(start, min(start + ROWS, len(matrix)))
            clips = {name: values[rows] for name, values in self.features.items() if only in (None, name)}
            matrix[rows, : rows.stop] = self._kernel(clips, rows.stop) + 1
        matrix.diagonal()[first:].add_(self.options.gamma)

    def _kernel(self, clips: Mapping[str, Tensor], count: int) -> Tensor:
        """The kernel (B, count), float64, of clips with the first `count` kept ones."""
        weights = {"visual": self.options.visual_weight, "audio": 1 - self.options.visual_weight}
        parts = []
        for name, values in clips.items():
            kept = self.features[name][:count].to(values.device)
            weight = weights[name] if len(self.features) > 1 else 1.0
            parts.append(weight * (-squared_distances(values, kept) / self.medians[name]).exp())
        return sum(parts[1:], parts[0])

    def _score(self, output: Output, weights: Tensor) -> Tensor:
        """k(x)ᵀB + 1ᵀB, (B, C), or (candidates, B, C) for several B."""
        clips = {name: part.half() for name, part in units(output).items()}
        for name, values in clips.items():
            self.features[name] = self.features[name].to(values.device)  # once, not for each batch
            if values.shape[1] != self.features[name].shape[1]:
                raise ArtifactError(
                    f"the state of the method is of {self.features[name].shape[1]} {name} features, these are "
                    f"{values.shape[1]}; run the step again"
                )
        kernel = self._kernel(clips, len(self.labels))
        return (kernel + 1) @ weights.to(kernel.device)


def units(output: Output) -> dict[str, Tensor]:
    """Return the features (B, width) of each modality that is present, in tokens of length 1, float32."""
    parts = {"audio": output.audio, "visual": output.visual}
    return {
        name: F.normalize(part.float(), dim=-1, eps=SHORTEST).flatten(1)
        for name, part in parts.items()
        if part is not None
    }


def squared_distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return ‖x − y‖² (B, N), float64, of rows (B, width) and (N, width); products in float32."""
    ours, theirs = ours.float(), theirs.float()
    products = (ours @ theirs.T).double()
    lengths = [rows.square().sum(dim=1).double() for rows in (ours, theirs)]
    return (lengths[0][:, None] + lengths[1] - 2 * products).clamp_min(0)


def median_distance(features: Tensor) -> float:
    """Return the median squared distance of different clips, of no more than `COMPARED`, evenly spaced."""
    every = max(1, -(-len(features) // COMPARED))
    chosen = features[::every]
    distances = squared_distances(chosen, chosen)[*torch.triu_indices(len(chosen), len(chosen), 1)]
    median = float(distances.median()) if len(distances) else 1.0
    return median if median > 0 else 1.0


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        raise ConfigError("method.gamma is too small for these features, or they have values that are not finite")
    return factor


METHOD = Kernel
