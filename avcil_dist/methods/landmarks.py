"""Nyström approximation of kernel ridge regression: the functions of a subset of the clips, the landmarks.

With K_m the kernel of the m landmarks, LLᵀ = K_m, and φ(x) = L⁻¹k_m(x), the scores φᵀ(G + γI)⁻¹H have the sums
G = Σ φφᵀ and H = Σ φyᵀ over all clips. With all clips as landmarks they are those of the exact regression.
Source: Williams and Seeger 2001; Rudi et al. 2015.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from avcil_dist.methods.row_blocks import cholesky
from avcil_dist.seeds import generator

JITTER = 1e-9  # of the mean diagonal, added to it: landmarks may be equal clips


def choose_landmarks(count: int, number: int, seed: int) -> Tensor:
    """Return `number` of `count` rows, ascending, uniformly drawn; all of them if there are no more."""
    chosen = generator(seed, "landmarks", count).choice(count, min(number, count), replace=False)
    return torch.from_numpy(chosen).long().sort().values


def landmark_factor(kernel: Tensor) -> Tensor:
    """Return L of the landmarks' kernel (m, m), float64."""
    kernel = kernel.clone()
    kernel.diagonal().add_(JITTER * kernel.diagonal().mean())
    return cholesky(kernel)


def landmark_sums(factor: Tensor, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> tuple[Tensor, Tensor]:
    """Return G (m, m) and H (m, C) over batches of kernel rows (B, m) and targets (B, C)."""
    total = factor.new_zeros(len(factor), len(factor)), factor.new_zeros(len(factor), num_classes)
    for kernel, targets in batches:
        features = torch.linalg.solve_triangular(factor, kernel.T, upper=False)
        total[0].addmm_(features, features.T)
        total[1].addmm_(features, targets)
    return total


def landmark_weights(factor: Tensor, sums: tuple[Tensor, Tensor], gamma: float) -> Tensor:
    """Return the weights (m, C) of the landmarks' kernel, L⁻ᵀ(G + γI)⁻¹H."""
    matrix = sums[0].clone()
    matrix.diagonal().add_(gamma)
    solved = torch.cholesky_solve(sums[1], cholesky(matrix))
    return torch.linalg.solve_triangular(factor.T, solved, upper=True)
