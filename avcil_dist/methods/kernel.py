"""Kernel ridge regression with a Gaussian (RBF) kernel per modality, on the features of all clips so far.

With v the pooled visual tokens of a clip, each of length 1, a its sound, of length 1, and m the median of the squared
distances between clips of step 0, K = w_v exp(−‖v − v'‖²/m_v) + w_a exp(−‖a − a'‖²/m_a). The scores are k(x)ᵀB + 1ᵀB
with (K + 11ᵀ + γI)B = Y, Y the one-hot classes: exact, for any order of classes and steps and any number of ranks.

The features of all training clips are kept, in float16: 2NF bytes for N clips of F numbers. Solving takes 16N² bytes
on one rank, 4N² / R on each of R ranks, which have blocks of rows. Beyond a limit of N, B is that of m landmarks, clips
that a seed draws (`landmarks.py`); every rank sums over its blocks of rows. Source: Saunders et al. 1998; a sum of
kernels per modality as in Gönen and Alpaydın 2011; landmarks: Williams and Seeger 2001.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.config.method_options import KernelOptions
from avcil_dist.errors import ArtifactError
from avcil_dist.methods.base import ClosedFormMethod, Needs, OneRank, Ranks, StepContext, Targets, check_matrix
from avcil_dist.methods.landmarks import choose_landmarks, landmark_factor, landmark_sums, landmark_weights
from avcil_dist.methods.losses import cross_entropy
from avcil_dist.methods.row_blocks import ROWS, cholesky, own_blocks, solve_in_row_blocks
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.models.state_dict import is_finite

SHORTEST = 1e-6  # length of a token that is scaled to length 1
COMPARED = 4096  # clips of step 0 whose distances have the median
MODALITIES = ("audio", "visual")


class Kernel(ClosedFormMethod):
    """Kernel ridge regression. The state is the features and labels of all clips, the medians and B."""

    gathers = True

    Options = KernelOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.features: dict[str, Tensor] = {}  # (N, width), float16
        self.labels = torch.zeros(0, dtype=torch.long)
        self.medians: dict[str, float] = {}
        self.landmarks: Tensor | None = None  # clips of an approximation, ascending
        self.weights: Tensor | None = None  # B, (N, C), or (m, C) of the landmarks
        self._factor: dict[str, Tensor] = {}  # rows of each step, up to and with the diagonal
        self._parts: dict[str, Tensor] = {}  # B of one modality, by its name
        self._collected: list[tuple[dict[str, Tensor], Tensor]] = []

    @property
    def needs(self) -> Needs:
        """Fixed features, without landmarks of no more clips than the limit."""
        return Needs(
            training="never",
            network_spec=NetworkSpec(pool=self.options.pool),
            clip_features=True,
            max_clips=None if self.options.landmarks else self.options.max_clips,
        )

    @property
    def takes_one_modality(self) -> bool:
        """True: there is a kernel for each."""
        return True

    def begin_step(self, context: StepContext) -> None:
        """Drop the previous step's head."""
        super().begin_step(context)
        self.weights, self.landmarks, self._parts, self.remark = None, None, {}, ""

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
        """Return (1, N or m, C), the only candidate, as one process. Raises ConfigError as `solve_together` does."""
        return self.solve_together(OneRank())

    def solve_together(self, ranks: Ranks) -> Tensor:
        """Return (1, N or m, C), the only candidate. Raises ConfigError if the kernel is singular in float64."""
        count = len(self.labels)
        if count > self.options.max_clips:
            self.landmarks = choose_landmarks(count, self.options.landmarks, self.options.landmark_seed)
            self._factor = {}
            self.remark = (
                f"kernel: {count:,} clips, more than method.max_clips={self.options.max_clips}; approximated by "
                f"{len(self.landmarks):,} landmarks"
            )
            return self._solve_landmarks(ranks)[None]
        if ranks.size == 1 or count <= ROWS or self.options.keep_factor:
            return ranks.make_together(self._solve_whole)
        return solve_in_row_blocks(self._block, self._targets(), ranks, rows=ROWS)[None]

    def _solve_whole(self) -> Tensor:
        """(1, N, C). The factor of the earlier steps' rows is extended by those of this step."""
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
        corner.copy_(cholesky(corner))
        if self.options.keep_factor:
            self._factor[f"factor_{self.context.step:03d}"] = factor[done:].clone()
        return torch.cholesky_solve(self._targets(), factor)[None]

    def _block(self, rows: slice, only: str | None = None) -> Tensor:
        """Rows of K + 11ᵀ + γI, up to the diagonal; `only`: of the kernel of one modality."""
        block = self._kernel(self._clips(rows, only), slice(rows.stop)) + 1
        block[:, rows].diagonal().add_(self.options.gamma)
        return block

    def _solve_landmarks(self, ranks: Ranks, only: str | None = None) -> Tensor:
        """(m, C) of the landmarks; `only`: of the kernel of one modality. A rank sums over its blocks of rows."""
        assert self.landmarks is not None
        device = self.features[only or next(iter(self.features))].device  # scores may have moved some
        landmarks, targets = self.landmarks.to(device), self._targets().to(device)

        def kernel(rows: slice | Tensor) -> Tensor:
            return self._kernel(self._clips(rows, only), landmarks) + 1

        def batches(blocks: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
            for rows in blocks:
                yield kernel(rows), targets[rows]

        factor = ranks.make_together(lambda: landmark_factor(kernel(landmarks)))
        own = own_blocks(len(self.labels), ranks, ROWS).values()
        sums = landmark_sums(factor, batches(own), self.context.num_seen)
        for total in sums:
            ranks.add_up(total)
        return ranks.make_together(lambda: landmark_weights(factor, sums, self.options.gamma))

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
            self._parts[name] = self._solve_part(name)
        return self._score(output, self._parts[name])

    def _solve_part(self, name: str) -> Tensor:
        """B of the kernel of one modality."""
        if self.landmarks is not None:
            return self._solve_landmarks(OneRank(), name)
        matrix = self.labels.new_zeros((len(self.labels), len(self.labels)), dtype=torch.float64)
        self._fill(matrix, 0, name)
        return torch.cholesky_solve(self._targets(), cholesky(matrix))

    def state_dict(self) -> dict[str, Any]:
        """Return features, labels, medians, B, the landmarks if there are, and the factor if it is kept."""
        assert self.weights is not None
        tensors = {**self.features, "labels": self.labels, "weights": self.weights, **self._factor}
        if self.landmarks is not None:
            tensors["landmarks"] = self.landmarks
        numbers = {"medians": dict(self.medians), **({"kernel": self._factor_options} if self._factor else {})}
        return {**{name: tensor.cpu() for name, tensor in tensors.items()}, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`. A factor that is not to be kept, or of another kernel, is left out."""
        self.features = {name: state[name] for name in MODALITIES if name in state}
        self.labels = state.get("labels", self.labels)
        self.medians = dict(state.get("medians", {}))
        self.weights, self.landmarks, self._parts = state.get("weights"), state.get("landmarks"), {}
        if self.options.keep_factor and state.get("kernel", self._factor_options) == self._factor_options:
            self._factor = {name: state[name] for name in sorted(state) if name.startswith("factor_")}

    def check_state(self, num_seen: int) -> None:
        """Check features, labels, medians, B, landmarks and the factor: shapes, types and numbers."""
        if self.weights is None:
            return
        count = len(check_matrix("weights", self.weights, torch.float64, columns=num_seen))
        if self.landmarks is not None:
            count = self._check_landmarks(self.landmarks, count)
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

    def _check_landmarks(self, landmarks: Any, number: int) -> int:
        """Check the clips of `number` landmarks; return the number of all clips."""
        count = len(self.labels) if isinstance(self.labels, Tensor) else 0
        if not isinstance(landmarks, Tensor) or landmarks.dtype != torch.long or landmarks.shape != (number,):
            raise ValueError(f"landmarks: not {number} whole numbers")
        if not 0 <= int(landmarks.min()) <= int(landmarks.max()) < count or bool((landmarks.diff() <= 0).any()):
            raise ValueError(f"landmarks: not ascending rows of {count} clips")
        return count

    @property
    def _factor_options(self) -> list[float]:
        """The options that the factor depends on."""
        return [self.options.gamma, self.options.visual_weight]

    def _clips(self, rows: slice | Tensor, only: str | None = None) -> dict[str, Tensor]:
        """Kept features of some clips; `only`: those of one modality."""
        return {name: values[rows] for name, values in self.features.items() if only in (None, name)}

    def _targets(self) -> Tensor:
        return F.one_hot(self.labels, self.context.num_seen).double()

    def _fill(self, matrix: Tensor, first: int, only: str | None = None) -> None:
        """Fill the rows from `first` on with those of `_block`."""
        for start in range(first, len(matrix), ROWS):
            rows = slice(start, min(start + ROWS, len(matrix)))
            matrix[rows, : rows.stop] = self._block(rows, only)

    def _kernel(self, clips: Mapping[str, Tensor], kept: slice | Tensor) -> Tensor:
        """The kernel (B, kept), float64, of clips with some of the kept ones.

        With landmarks its products are in float64: their weights are large numbers of both signs.
        """
        weights = {"visual": self.options.visual_weight, "audio": 1 - self.options.visual_weight}
        parts = []
        for name, values in clips.items():
            theirs = self.features[name][kept].to(values.device)
            if self.landmarks is not None:
                values, theirs = values.double(), theirs.double()
            weight = weights[name] if len(self.features) > 1 else 1.0
            parts.append(weight * (-squared_distances(values, theirs) / self.medians[name]).exp())
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
        kept = slice(None) if self.landmarks is None else self.landmarks.to(output.logits.device)
        kernel = self._kernel(clips, kept)
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
    """Return ‖x − y‖² (B, N), float64, of rows (B, width) and (N, width). Products are in float32, of float64 in it."""
    if ours.dtype != torch.float64:
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


METHOD = Kernel
