"""BiC: distillation, and after it two numbers that correct the bias of the new classes' logits.

The logits of new classes become αz + β, with α and β from balanced validation clips. They go into the rows of the head,
which has the same outputs. Source: Wu et al. 2019 (arXiv 1905.13260). There the validation clips are a tenth of the
exemplars and as many new clips per class; here they are those of the data set, each class with the same weight.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from avcil_dist.methods.base import Needs
from avcil_dist.methods.wa import HEAD, Wa

BIAS = "classifier.bias"
SHRINKAGE = 1e-3  # of α − 1 and β, so that classes that are separated without error have a correction
ROUNDS = 50
CONVERGED = 1e-10


class Bic(Wa):
    """(1 − λ) CE_all + λ KD, λ the share of old classes; then α and β."""

    @property
    def needs(self) -> Needs:
        """A teacher, exemplars among the current clips, and the logits of validation clips."""
        return Needs(teacher=True, memory="join", selection="herding", validation=True, calibration=True)

    def calibrate(self, logits: Tensor, labels: Tensor) -> list[float]:
        """Return α and β."""
        return bias_correction(logits, labels, self.context.num_old)

    def committed_weights(self, weights: Mapping[str, Tensor], calibration: Sequence[float]) -> dict[str, Tensor]:
        """Correct the head's rows of new classes."""
        if not calibration:
            return dict(weights)
        alpha, beta = calibration
        head, bias, new = weights[HEAD].clone(), weights[BIAS].clone(), slice(self.context.num_old, None)
        head[new] *= alpha
        bias[new] = alpha * bias[new] + beta
        return {**weights, HEAD: head, BIAS: bias}


def bias_correction(logits: Tensor, labels: Tensor, num_old: int) -> list[float]:
    """Return α and β of minimum cross-entropy, of logits (N, C) whose classes from `num_old` on become αz + β.

    Each class of `labels` (N,) has the same weight. The loss has (α − 1)² + β² added, times `SHRINKAGE` / 2. It is
    convex; Newton's method with a line search finds its minimum.
    """
    logits = logits.double().cpu()
    labels = labels.cpu()
    counts = torch.bincount(labels, minlength=logits.shape[1])
    weights = 1 / counts[labels].double() / int((counts > 0).sum())
    is_new = torch.arange(logits.shape[1]) >= num_old
    slopes = torch.stack([logits * is_new, is_new.double().expand_as(logits)], dim=2)  # of logits in (α, β)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    rows = torch.arange(len(labels))

    def corrected(point: Tensor) -> Tensor:
        return logits + slopes @ (point - start)

    def loss(point: Tensor) -> Tensor:
        own = corrected(point).log_softmax(dim=1)[rows, labels]
        return -(weights * own).sum() + SHRINKAGE / 2 * (point - start).square().sum()

    point = start
    for _ in range(ROUNDS):
        probabilities = corrected(point).softmax(dim=1)
        mean = torch.einsum("nc,ncp->np", probabilities, slopes)
        gradient = (weights[:, None] * (mean - slopes[rows, labels])).sum(dim=0) + SHRINKAGE * (point - start)
        centred = slopes - mean[:, None]
        curvature = torch.einsum("n,nc,ncp,ncq->pq", weights, probabilities, centred, centred)
        direction = -torch.linalg.solve(curvature + SHRINKAGE * torch.eye(2, dtype=torch.float64), gradient)
        length, descent = 1.0, float(gradient @ direction)
        while loss(point + length * direction) > loss(point) + 1e-4 * length * descent and length > 1e-6:
            length /= 2
        point = point + length * direction
        if -descent < CONVERGED:
            break
    return [float(value) for value in point]


METHOD = Bic
