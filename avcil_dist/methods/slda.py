"""Streaming linear discriminant analysis: class means and one shared covariance of fixed features.

Source: Hayes and Kanan 2020 (arXiv 1909.01520). Their running covariance depends on the order of the clips; here it is
the covariance within classes of all clips so far.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from avcil_dist.config.method_options import SldaOptions
from avcil_dist.errors import ConfigError
from avcil_dist.methods.feature_sums import TARGETS, RidgeSolver
from avcil_dist.methods.sums_head import SumsHead


class Slda(SumsHead):
    """Scores x·Λμ_c − ½ μ_cᵀΛμ_c, Λ = ((1 − ε)Σ + εI)⁻¹, for features x, class means μ_c and their covariance Σ."""

    Options = SldaOptions

    def head(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> Tensor:
        """Return Λμ_c, and −½ μ_cᵀΛμ_c for the constant. Raises ConfigError for a singular covariance."""
        counts, shrinkage = sums[TARGETS][-1], self.options.shrinkage
        if rows is None:
            rows = torch.arange(len(sums[TARGETS]), device=counts.device)
        solver = RidgeSolver(sums, rows[:-1])
        means = solver.targets / counts.clamp_min(1)
        solver.fill()
        solver.matrix.addmm_(solver.targets, means.T, alpha=-1).mul_((1 - shrinkage) / counts.sum())
        if not solver.factorize(shrinkage):
            raise ConfigError(
                f"method.shrinkage={shrinkage} is too small for these features; raise it, or check the features for "
                "values that are not finite"
            )
        solver.targets = means
        weights = solver.solution()
        return torch.cat([weights, -(means * weights).sum(dim=0, keepdim=True) / 2])


METHOD = Slda
