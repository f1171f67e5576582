"""Softmax statistics of a tile, and the factors of its gradient. Letters as in `docs/attention.md`."""

from typing import NamedTuple

import torch
from torch import Tensor


class SoftmaxStatistics(NamedTuple):
    """Softmax statistics of a tile.

    Normaliser Z, mean key q, mean token P, frame weights u and frame scores, all (C, T, D); and the log-sum-exp of the
    frame scores (C, D).
    """

    total: Tensor
    key: Tensor
    token: Tensor
    weights: Tensor
    scores: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, sums: Tensor, guide: Tensor) -> "SoftmaxStatistics":
        """Compute from the sums of e, e·p and e·V; the third may be of another factor than V."""
        total, key, token = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        scores = key * guide.unsqueeze(1)
        exponentials = scores.exp()
        normaliser = exponentials.sum(1)
        return cls(total, key, token, exponentials / normaliser.unsqueeze(1), scores, normaliser.log())

    @property
    def pooled(self) -> Tensor:
        """Pooled tokens (C, D)."""
        return (self.weights * self.token).sum(1)

    def score_slope(self, sums: Tensor, guide: Tensor) -> Tensor:
        """Return the derivative of the frame scores with respect to the guide, (C, T, D); needs the sum of e·p²."""
        return self.key + guide.unsqueeze(1) * (sums[3] / sums[0] - self.key.square())

    def factors(self, guide: Tensor, pooled_grad: Tensor, score_term: Tensor, constant_term: Tensor) -> Tensor:
        """Return the factors f of `AttentionKernels.differentiate`, (3, C, T, D), for the gradient of pooled (C, D).

        `guide` is (C, 1, D). `score_term` (C, T, D) is what the temporal divergence adds to the gradient of the frame
        scores, `constant_term` (C, 1 or T, D) what the spatial divergence adds to the gradient of every position.
        """
        share = self.weights * pooled_grad.unsqueeze(1)
        of_key = guide * (score_term + share * (self.token - self.pooled.unsqueeze(1)))
        of_token = guide * share
        constant = constant_term + of_key * (1 - guide * self.key) - of_token * self.token
        return torch.stack([constant, of_key * guide, of_token]).div_(self.total)
