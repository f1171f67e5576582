"""AIR: ridge regression on class-balanced sums over clips of an expansion of fixed features.

Source: Fang et al. 2024 (arXiv 2408.10349). Each clip has the weight 1 / n_c, n_c the number of training clips of its
class, so frequent classes do not dominate the regression.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from avcil_dist.config.method_options import AirOptions
from avcil_dist.methods.base import Needs
from avcil_dist.methods.sums_head import RidgeHead
from avcil_dist.models.outputs import Output


class Air(RidgeHead):
    """Ridge regression W = (Σ φφᵀ/n_c + γI)⁻¹ Σ φyᵀ/n_c."""

    Options = AirOptions

    @property
    def needs(self) -> Needs:
        """Fixed features, and the number of clips of a class when its first ones are summed."""
        return replace(super().needs, whole_classes=True)

    def begin_sums(self, counts: Mapping[int, int]) -> None:
        """Set the weights of the step's classes."""
        weights = torch.zeros(self.context.num_seen, dtype=torch.float64)
        for label, count in counts.items():
            weights[label] = 1 / max(1, count)
        self._class_weights = weights

    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Add these clips to the sums, each with the weight of its class."""
        weights = self._class_weights.to(labels.device)[labels]
        self.sums.add(self.phi(output), labels, self.context.num_seen, weights)


METHOD = Air
