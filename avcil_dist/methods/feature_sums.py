"""Sums over clips, G = Σ φφᵀ and H = Σ φyᵀ in float64, and the solution of their normal equations.

φ (F,) are the fixed features of a clip, y (C,) is its one-hot class. The last feature of a φ with a constant is 1, so
the last row of H has the number of clips of each class.

Memory use in bytes: every rank holds G as trapezoids above its diagonal, about 4F²(1 + 1024/F), once for the previous
steps and once for this one. A solver holds two whole F × F matrices, 16F², while it factorises.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.errors import ArtifactError
from avcil_dist.methods.base import check_matrix
from avcil_dist.models.state_dict import is_finite

PANEL = 1024  # rows of a panel of G
INVERSE_BLOCK = 512  # columns that are inverted together: twice as many need a sixth more operations
SINGLE_FROM = 8192  # features from which on float32 is tried: with 4,501 it took longer than float64
ROWS = 1024  # clips per matrix product: a product of fewer is limited by memory bandwidth
TARGETS = "targets"  # name of H


class FeatureSums:
    """G, as panels of rows from the diagonal on, and H, of the previous steps and of this one; or H alone."""

    def __init__(self, *, has_gram: bool = True) -> None:
        self._has_gram = has_gram
        self._previous: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}
        self._collected: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, phi: Tensor, labels: Tensor, num_classes: int, clip_weights: Tensor | None = None) -> None:
        """Collect clips, and add them to the sums once there are `ROWS` of them.

        `phi` (B, F), `labels` (B,) among `num_classes`. `clip_weights` (B,) are factors of the clips' terms.
        """
        self._collected.append((phi, labels, clip_weights))
        if sum(len(rows) for rows, _, _ in self._collected) >= ROWS:
            self.flush(num_classes)

    def flush(self, num_classes: int) -> None:
        """Add the products of the collected clips to the sums: to H, and to each panel of G from the diagonal on."""
        if not self._collected:
            return
        phi = torch.cat([rows for rows, _, _ in self._collected]).double()
        labels = torch.cat([labels for _, labels, _ in self._collected])
        weights = [part for _, _, part in self._collected if part is not None]
        self._collected = []
        weighted = phi * torch.cat(weights).double()[:, None] if weights else phi
        if not self._new:
            if self._previous:
                check_length(phi, self._previous[TARGETS])
            self._new = self._zeros(phi.shape[1], num_classes, phi.device)
        for name, first in self._panels(phi.shape[1]):
            self._new[name].addmm_(phi[:, first : first + PANEL].T, weighted[:, first:])
        self._new[TARGETS].addmm_(weighted.T, F.one_hot(labels, num_classes).double())

    def of_step(self, num_classes: int) -> list[Tensor]:
        """Return G's panels and H of this step's clips, to be summed over ranks in place."""
        self.flush(num_classes)
        return [self._new[name] for name in sorted(self._new)]

    def total(self) -> dict[str, Tensor]:
        """Return the sums over all clips so far: those of the previous steps are added to this step's in place."""
        if not self._new:
            return self._previous
        for name, value in self._previous.items():
            self._new[name][:, : value.shape[1]] += value.to(self._new[name].device)
        self._previous = {}
        return self._new

    def end_step(self) -> None:
        """Make this step's sums part of the previous ones."""
        self._previous, self._new = self.total(), {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums over the clips of all ended steps."""
        return {name: value.cpu() for name, value in self._previous.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the sums of the previous steps."""
        self._previous = dict(state)

    def check_state(self, size: int, num_classes: int) -> None:
        """Check loaded sums of `size` features. Raises ValueError for other names, types or shapes, and for NaN."""
        shapes = self._shapes(size, num_classes)
        if self._previous.keys() != shapes.keys():
            raise ValueError("it lacks sums, or has others")
        for name, (rows, columns) in shapes.items():
            check_matrix(name, self._previous[name], torch.float64, rows=rows, columns=columns)
        if not all(is_finite(values) for values in self._previous.values()):
            raise ValueError("it has numbers that are not finite")

    def _panels(self, size: int) -> list[tuple[str, int]]:
        return panels(size) if self._has_gram else []

    def _shapes(self, size: int, num_classes: int) -> dict[str, tuple[int, int]]:
        shapes = {name: (min(PANEL, size - first), size - first) for name, first in self._panels(size)}
        return {**shapes, TARGETS: (size, num_classes)}

    def _zeros(self, size: int, num_classes: int, device: torch.device) -> dict[str, Tensor]:
        shapes = self._shapes(size, num_classes)
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}


class RidgeSolver:
    """Solution W = (G + D)⁻¹H of the normal equations, D diagonal, for all features or for some of them."""

    def __init__(
        self, sums: Mapping[str, Tensor], rows: Tensor | None = None, *, dtype: torch.dtype = torch.float64
    ) -> None:
        """Prepare to solve for the features `rows` (ascending indices), by default all, by a factor of type `dtype`.

        `sums` are those of `FeatureSums.total`.
        """
        self._sums, self._rows = sums, rows
        self.targets = sums[TARGETS] if rows is None else sums[TARGETS][rows]
        self.matrix = self.targets.new_zeros(len(self.targets), len(self.targets), dtype=dtype)
        self._info = torch.zeros((), dtype=torch.int32, device=self.targets.device)

    def factorize(self, ridge: Tensor | float) -> bool:
        """Overwrite `matrix`, filled with G, by the upper Cholesky factor of G + D; whether that is positive definite.

        `ridge` is D's diagonal (features,), or a number for all of them.
        """
        self.matrix.diagonal().add_(ridge)
        torch.linalg.cholesky_ex(self.matrix, upper=True, out=(self.matrix, self._info))
        return not self._info.item()

    def fill(self) -> None:
        """Overwrite the upper triangle of `matrix` by that of G."""
        for name, first in panels(len(self._sums[TARGETS])):
            panel = self._sums[name]
            if self._rows is None:
                self.matrix[first : first + PANEL, first:] = panel
                continue
            inside = (self._rows >= first) & (self._rows < first + PANEL)
            right = self._rows >= first
            values = panel[self._rows[inside] - first][:, self._rows[right] - first]
            self.matrix[inside.nonzero(), right.nonzero().T] = values

    @property
    def mean_diagonal(self) -> float:
        """Mean of G's diagonal."""
        parts = [self._sums[name].diagonal() for name, _ in panels(len(self._sums[TARGETS]))]
        diagonal = torch.cat(parts)
        return float((diagonal if self._rows is None else diagonal[self._rows]).mean())

    def single(self) -> Mapping[str, Tensor] | None:
        """Return the sums if they are of so many features that float32 saves time, and of all of them; else None."""
        return self._sums if self._rows is None and len(self.targets) >= SINGLE_FROM else None

    def solution(self) -> Tensor:
        """Return W (features, C) by the factor."""
        return torch.cholesky_solve(self.targets, self.matrix, upper=True)

    def inverse_diagonal(self) -> Tensor:
        """Return the diagonal of (G + D)⁻¹ (features,), and overwrite the factor by its inverse.

        With G + D = UᵀU it is the squared lengths of the rows of U⁻¹. Blocks of columns are inverted from left to
        right, in place; a block of rows needs only those below it, which are not overwritten yet.
        """
        factor, size, block = self.matrix, len(self.matrix), INVERSE_BLOCK
        squares = factor.new_zeros(size)
        for first in range(0, size, block):
            columns = slice(first, min(first + block, size))
            corner = factor[columns, columns].triu()
            corner = torch.linalg.solve_triangular(corner, torch.eye(len(corner)).to(corner), upper=True)
            for top in range(0, first, block):
                rows = slice(top, top + block)
                inverse = -(factor[rows, top:first] @ factor[top:first, columns]) @ corner
                factor[rows, columns] = inverse
                squares[rows] += inverse.square().sum(dim=1)
            factor[columns, columns] = corner
            squares[columns] += corner.square().sum(dim=1)
        return squares


def panels(size: int) -> list[tuple[str, int]]:
    """Return names and first rows of the panels of a `size` × `size` matrix."""
    return [(f"gram_{first // PANEL:03d}", first) for first in range(0, size, PANEL)]


def check_length(phi: Tensor, rows: Tensor) -> None:
    """Raise ArtifactError for a state of features of another length."""
    if phi.shape[1] != len(rows):
        raise ArtifactError(
            f"the state of the method is of {len(rows)} features, these are {phi.shape[1]}; run the earlier step again"
        )
