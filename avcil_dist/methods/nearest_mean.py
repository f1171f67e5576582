"""Prediction by the nearest mean of exemplars (Rebuffi et al. 2017), for the methods that support it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.errors import ArtifactError
from avcil_dist.methods.base import Method, StepContext, check_matrix
from avcil_dist.models.outputs import Output


class NearestMean(Method):
    """Method that predicts by class means if `needs.means`, otherwise by its head.

    Within a step the new classes have no means yet, so the head predicts, also to select the epoch.
    """

    means: Tensor | None = None

    def begin_step(self, context: StepContext) -> None:
        """Drop the means, which belong to the previous step's network."""
        super().begin_step(context)
        self.means = None

    def end_step(self, exemplars: Sequence[Tensor] | None) -> None:
        """Compute the means from the exemplars' features."""
        self.means = None if exemplars is None else class_means(exemplars)

    def scores(self, output: Output) -> Tensor:
        """Return the nearness to each class's mean if there are means, otherwise the logits."""
        if self.means is None:
            return output.logits
        if self.means.shape[1] != output.feature.shape[1]:
            raise ArtifactError(
                f"the means of the classes have {self.means.shape[1]} numbers, the features {output.feature.shape[1]}; "
                "run the step again"
            )
        return nearness(output.feature, self.means)

    def state_dict(self) -> dict[str, Any]:
        """Return the means, so that the step's artifact predicts as the step did."""
        return {} if self.means is None else {"means": self.means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the means. Raises ValueError for anything else."""
        if strangers := state.keys() - {"means"}:
            raise ValueError(f"it has {min(strangers)}, which is not of {type(self).__name__}")
        self.means = state.get("means")

    def check_state(self, num_seen: int) -> None:
        """Check the means: a row for each class, of numbers, or of NaN for a class without exemplars."""
        if self.means is None:
            return
        check_matrix("means", self.means, torch.float32, rows=num_seen)
        unknown = self.means.isnan()
        if self.means.isinf().any() or not torch.equal(unknown.all(dim=1), unknown.any(dim=1)):
            raise ValueError("means have numbers that are not finite")


def class_means(exemplars: Sequence[Tensor]) -> Tensor:
    """Return means (C, D), float32, of each class's unit-norm features (n, D); NaN for a class without exemplars."""
    rows = [F.normalize(features.double(), dim=1) for features in exemplars]
    dim = next((features.shape[1] for features in rows if len(features)), 0)
    none = torch.full((dim,), torch.nan, dtype=torch.float64)
    return torch.stack([features.mean(dim=0).cpu() if len(features) else none for features in rows]).float()


def nearness(feature: Tensor, means: Tensor) -> Tensor:
    """Return the negative squared distance (B, C) of unit-norm features (B, D) to class means (C, D).

    A class without a mean has distance infinity, so it is never predicted.
    """
    units, centres = F.normalize(feature, dim=1), means.to(feature)
    distance = units.square().sum(1, keepdim=True) - 2 * units @ centres.T + centres.square().sum(1)
    return -distance.nan_to_num(nan=torch.inf)
