"""Map of one clip over frames and positions, and its share on a part of the picture. Needs no torch."""

from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]  # top, left, bottom, right as fractions of the picture


@dataclass(frozen=True)
class TokenMap:
    """Share (T, rows, columns) of each visual token of a clip. It sums to 1; all zeros where nothing has a share."""

    mass: np.ndarray

    @property
    def temporal(self) -> np.ndarray:
        """Mass of each frame (T,)."""
        return np.asarray(self.mass.sum(axis=(1, 2)))

    @property
    def spatial(self) -> np.ndarray:
        """Mass of each position within its frame (T, rows, columns); a frame sums to 1, or is all zeros."""
        frames = self.temporal[:, None, None]
        return np.divide(self.mass, frames, out=np.zeros_like(self.mass), where=frames > 0)

    def share(self, box: Box) -> float:
        """Return the mass within a box; a cell that the box covers in part counts in that proportion."""
        top, left, bottom, right = box
        rows = _coverage(self.mass.shape[1], top, bottom)
        columns = _coverage(self.mass.shape[2], left, right)
        return float(np.einsum("trc,r,c->", self.mass, rows, columns))


def _coverage(cells: int, first: float, last: float) -> np.ndarray:
    """Fraction of each of `cells` equal cells of [0, 1] that lies in [first, last]."""
    edges = np.arange(cells + 1) / cells
    return np.clip(np.minimum(edges[1:], last) - np.maximum(edges[:-1], first), 0, None) * cells
