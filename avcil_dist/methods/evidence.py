"""Ridge weights by maximum evidence: a precision for each block of features, and one for the noise.

The model: the columns of W have normal priors of precision α_b in block b, and y = Wᵀφ plus noise of precision β. The
evidence of the sums G and H over N clips has its maximum at a fixed point, which rounds of re-estimation approach
(MacKay 1992; Bishop 2006, section 3.5.2, with a precision per block and C outputs).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from avcil_dist.errors import ConfigError
from avcil_dist.methods.feature_sums import RidgeSolver
from avcil_dist.methods.single_precision import SingleSolver

ROUNDS = 8
CONVERGED = 0.05  # change of log α
CONSTANT_PRECISION = 1e-3  # of the features outside the blocks: the constant
SMALLEST_RIDGE = 1e-11  # relative to the mean of G's diagonal; below it, G + D may be singular in float64


def evidence_ridge(solver: RidgeSolver, blocks: Sequence[slice]) -> Tensor:
    """Return the ridge of each feature (F,), α/β, of maximum evidence. The factor of `solver` is overwritten.

    Many features are factorised in float32 as long as that is enough (see `SingleSolver.round`). `blocks` are disjoint
    ranges of features. The last feature is the constant 1. Raises ConfigError if the sums cannot
    be factorised in float64.
    """
    num_clips, num_classes = float(solver.targets[-1].sum()), solver.targets.shape[1]
    sizes = torch.tensor([float(block.stop - block.start) for block in blocks], dtype=torch.float64)
    alphas, beta = torch.ones(len(blocks), dtype=torch.float64), float(num_classes)
    smallest = SMALLEST_RIDGE * solver.mean_diagonal
    sums = solver.single()
    single = None if sums is None else SingleSolver(sums)

    def ridge() -> Tensor:
        values = solver.targets.new_full((len(solver.targets),), CONSTANT_PRECISION)
        for block, alpha in zip(blocks, alphas.tolist(), strict=True):
            values[block] = alpha
        return (values / beta).clamp_min(smallest)

    def sums_of_blocks(values: Tensor) -> Tensor:
        return torch.stack([values[block].sum() for block in blocks]).cpu()

    for _ in range(ROUNDS):
        current = ridge()
        found = single.round(current) if single else None
        if found is None:
            single = None  # of no further round either
            factorize(solver, current)
            found = solver.solution(), solver.inverse_diagonal()
        weights, inverse_diagonal = found
        squares = weights.square().sum(dim=1)
        # Of Σ = (βG + diag α)⁻¹: α_b tr Σ_bb is the ridge's share of the inverse of G + diag(α/β).
        determined = (sizes - sums_of_blocks(current * inverse_diagonal)).clamp_min(1e-6)
        # tr(WᵀGW) = tr(WᵀH) − Σ (α/β)‖W‖², by the normal equations.
        residual = num_clips - float((weights * solver.targets).sum()) - float((current * squares).sum())
        previous = alphas
        alphas = num_classes * determined / sums_of_blocks(squares).clamp_min(1e-12)
        free = max(num_clips - float(determined.sum()), 1e-6)
        beta = num_classes * free / max(residual, 1e-12 * num_clips)
        if (alphas.log() - previous.log()).abs().max() < CONVERGED:
            break
    return ridge()


def factorize(solver: RidgeSolver, ridge: Tensor) -> None:
    """Overwrite the matrix of `solver` by the factor of G + D. Raises ConfigError if float64 has none."""
    solver.fill()
    if not solver.factorize(ridge):
        raise ConfigError(
            "method.gamma: the sums over the clips cannot be factorised in float64; check the features for values that "
            "are not finite, or use method.gamma=validation"
        )
