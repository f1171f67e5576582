"""Normal equations in float32, with one step of refinement in float64, and a test that this was enough.

A Cholesky factorisation and an inverse in float32 take half the time of float64. The large eigenvalues of G come from
the mean of the features, so the constant is eliminated first, in float64: what is left are the centred sums.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.methods.feature_sums import PANEL, RidgeSolver, panels

PROBES = 8  # random vectors on which float32 is compared with its refinement
TOLERANCE = 1e-3  # relative change by the refinement


class SingleSolver(RidgeSolver):
    """Solution of (G + D)W = H for all features, the last of which is the constant 1."""

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        super().__init__(sums, dtype=torch.float32)
        self._means = self.targets.sum(dim=1)  # N times: G's column of the constant, because each clip has one class
        signs = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, 2, (len(self._means), PROBES), generator=signs).double() * 2 - 1
        self._probes = drawn.to(self._means.device)

    def round(self, ridge: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return W (F, C) and the diagonal of (G + D)⁻¹ (F,) for D's diagonal `ridge`; that of the constant is not set.

        None if float32 is not enough: if it has no factor, or if the refinement changes zᵀ(G + D)⁻¹z of a random vector
        z, or the whole of W, by more than `TOLERANCE`. The mean of zᵀ(G + D)⁻¹z is the trace (Hutchinson 1990).
        """
        total = self._means[-1] + ridge[-1]
        wanted = torch.cat([self.targets - self._means[:, None] * (self.targets[-1] / total), self._probes], dim=1)
        wanted[-1] = 0
        self._fill_centred(total)
        if not self.factorize(ridge.float()):
            return None
        first = self._solve(wanted)
        change = self._solve(wanted - self._apply(first, ridge, total))
        refined = first + change
        count = self.targets.shape[1]
        traces = (self._probes * refined[:, count:]).sum(), (self._probes * change[:, count:]).sum()
        weights = refined[:, :count]
        if not (change[:, :count].norm() <= TOLERANCE * weights.norm() and traces[1].abs() <= TOLERANCE * traces[0]):
            return None
        weights[-1] = (self.targets[-1] - self._means[:-1] @ weights[:-1]) / total
        return weights, self.inverse_diagonal().double()

    def _fill_centred(self, total: Tensor) -> None:
        """Overwrite the upper triangle of `matrix` by that of G without the constant, which is left alone with a 1."""
        means = self._means
        for name, first in panels(len(means)):
            rows = slice(first, first + PANEL)
            self.matrix[rows, first:] = self._sums[name] - means[rows, None] * (means[first:] / total)
        self.matrix[:, -1] = 0
        self.matrix[-1, -1] = 1

    def _solve(self, wanted: Tensor) -> Tensor:
        return torch.cholesky_solve(wanted.float(), self.matrix, upper=True).double()

    def _apply(self, columns: Tensor, ridge: Tensor, total: Tensor) -> Tensor:
        """(G − mmᵀ/total + D) times `columns`, in float64, without the constant."""
        product = ridge[:, None] * columns - self._means[:, None] * ((self._means @ columns) / total)
        for name, first in panels(len(columns)):
            panel, rows = self._sums[name], slice(first, first + PANEL)
            product[rows] += panel @ columns[first:]
            product[first + PANEL :] += panel[:, PANEL:].T @ columns[rows]
        return F.pad(product[:-1], (0, 0, 0, 1))
