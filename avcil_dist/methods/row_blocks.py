"""Cholesky solution of a large system whose matrix is distributed over ranks in blocks of rows.

A rank has every R-th block of the lower triangle, 4N²/R bytes of N rows, and for each panel of columns its factor,
8N · `ROWS` bytes. The blocks do not depend on the number of ranks R > 1, so neither does the result.
Source: the right-looking blocked factorisation, Golub and Van Loan 2013, 4.2.6.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import Ranks

ROWS = 1024  # of a block


def row_blocks(size: int, rows: int) -> list[slice]:
    """Return the blocks of a matrix of `size` rows, in order."""
    return [slice(first, min(first + rows, size)) for first in range(0, size, rows)]


def own_blocks(size: int, ranks: Ranks, rows: int) -> dict[int, slice]:
    """Return the blocks of this rank by their numbers."""
    return {number: block for number, block in enumerate(row_blocks(size, rows)) if number % ranks.size == ranks.rank}


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor. Raises ConfigError for a matrix that is not positive definite."""
    return _checked(_factor(matrix))


def solve_in_row_blocks(make: Callable[[slice], Tensor], targets: Tensor, ranks: Ranks, *, rows: int) -> Tensor:
    """Return A⁻¹Y (N, C) for targets Y (N, C), on all ranks; A is symmetric and positive definite.

    `make` returns the rows of a block, as new memory, (block, columns up to its diagonal). Raises ConfigError on all
    ranks as `cholesky` does.
    """
    solution, blocks = targets.clone(), row_blocks(len(targets), rows)
    own = {number: make(block) for number, block in own_blocks(len(targets), ranks, rows).items()}
    for number, panel in enumerate(blocks):
        corner = _corner(own.get(number), panel, targets)
        ranks.share(corner, number % ranks.size)
        _checked(corner)
        column = targets.new_zeros(len(targets) - panel.stop, len(corner))  # of all rows below the panel's
        below = [other for other in own if other > number]
        for other in below:
            rows_of = own[other][:, panel]
            rows_of.copy_(torch.linalg.solve_triangular(corner, rows_of.T, upper=False).T)
            column[blocks[other].start - panel.stop : blocks[other].stop - panel.stop] = rows_of
        ranks.add_up(column)
        for other in below:
            end = blocks[other].stop - panel.stop
            own[other][:, panel.stop :].addmm_(own[other][:, panel], column[:end].T, alpha=-1)
        solution[panel] = torch.linalg.solve_triangular(corner, solution[panel], upper=False)
        solution[panel.stop :] -= column @ solution[panel]
    return _solve_transposed(own, blocks, solution, ranks)


def _solve_transposed(own: dict[int, Tensor], blocks: list[slice], solution: Tensor, ranks: Ranks) -> Tensor:
    """Solve LᵀB = `solution` in place, from the last block to the first; its owner sends B and what it subtracts."""
    for number, block in reversed(list(enumerate(blocks))):
        update = solution[: block.stop].clone()
        if number in own:
            corner = own[number][:, block]
            update[block] = torch.linalg.solve_triangular(corner.T, update[block], upper=True)
            update[: block.start] -= own[number][:, : block.start].T @ update[block]
        ranks.share(update, number % ranks.size)
        solution[: block.stop] = update
    return solution


def _corner(own: Tensor | None, panel: slice, like: Tensor) -> Tensor:
    """The factor of the diagonal block, which its owner computes; NaN where there is none."""
    width = panel.stop - panel.start
    if own is None:
        return like.new_zeros(width, width)
    factor = _factor(own[:, panel])
    own[:, panel] = factor
    return factor.contiguous()


def _factor(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor; NaN where there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return factor.fill_(torch.nan) if info.item() else factor


def _checked(factor: Tensor) -> Tensor:
    if not bool(torch.isfinite(factor.diagonal()).all()):
        raise ConfigError("method.gamma is too small for these features, or they have values that are not finite")
    return factor
