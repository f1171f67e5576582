"""Attention of one clip as a distribution over frames and positions, for figures and for its share on a region."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avcil_dist.models.attention.module import AudioGuidedAttention

Box = tuple[float, float, float, float]  # top, left, bottom, right as fractions of the picture


@dataclass(frozen=True)
class AttentionMap:
    """Attention mass (T, rows, columns) of a clip: the weight of each token in the pooled vector, mean over channels.

    It sums to 1.
    """

    mass: np.ndarray

    @property
    def temporal(self) -> np.ndarray:
        """Mass of each frame (T,)."""
        return np.asarray(self.mass.sum(axis=(1, 2)))

    @property
    def spatial(self) -> np.ndarray:
        """Mass of each position within its frame (T, rows, columns); each frame sums to 1."""
        return np.asarray(self.mass / self.temporal[:, None, None])

    def share(self, box: Box) -> float:
        """Return the mass within a box; a cell that the box covers in part counts in that proportion."""
        top, left, bottom, right = box
        rows = _coverage(self.mass.shape[1], top, bottom)
        columns = _coverage(self.mass.shape[2], left, right)
        return float(np.einsum("trc,r,c->", self.mass, rows, columns))


@torch.no_grad()
def attention_maps(attention: AudioGuidedAttention, audio: Tensor, visual: Tensor) -> list[AttentionMap]:
    """Return the map of each clip, for `audio` (B, D) and `visual` (B, T, S, D).

    S is a square grid of positions; another number of them is taken as one row.
    """
    spatial, temporal = attention.maps(audio, visual)
    mass = (temporal.unsqueeze(2) * spatial).double().mean(dim=3).cpu().numpy()
    side = math.isqrt(mass.shape[2])
    grid = (side, side) if side * side == mass.shape[2] else (1, mass.shape[2])
    return [AttentionMap(clip.reshape(len(clip), *grid)) for clip in mass]


def _coverage(cells: int, first: float, last: float) -> np.ndarray:
    """Fraction of each of `cells` equal cells of [0, 1] that lies in [first, last]."""
    edges = np.arange(cells + 1) / cells
    return np.clip(np.minimum(edges[1:], last) - np.maximum(edges[:-1], first), 0, None) * cells
