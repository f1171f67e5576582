"""Cost of a head from sums over clips: `python -m tests.benchmarks.sums --tokens 9 --dim 1111 --classes 309`.

Clips are class means plus noise, in tokens of length 1. A part of the clips is summed and timed, and the sums are then
scaled to all of them, because the solution does not depend on how the sums came about.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from avcil_dist.methods import feature_sums
from avcil_dist.methods.evidence import evidence_ridge, factorize
from avcil_dist.methods.feature_sums import FeatureSums, RidgeSolver
from tests.benchmarks.memory import megabytes


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return wall time and processor time per thread of a call, in seconds. They are equal on a quiet machine."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, (time.process_time() - processor) / torch.get_num_threads()


def sums_of(tokens: int, dim: int, classes: int, summed: int, noise: float, informative: int) -> FeatureSums:
    """Return the sums over `summed` random clips; the first `informative` tokens depend on the class."""
    random = torch.Generator().manual_seed(0)
    means, sums = torch.randn(classes, tokens, dim, generator=random), FeatureSums()
    for first in range(0, summed, 1024):
        labels = torch.randint(classes, (min(1024, summed - first),), generator=random)
        means[:, informative:] = 1.0
        clips = means[labels] + noise * torch.randn(len(labels), tokens, dim, generator=random)
        sums.add(F.pad(F.normalize(clips, dim=-1).flatten(1), (0, 1), value=1.0), labels, classes)
    sums.flush(classes)
    return sums


def main() -> None:
    """Print the time per clip of the sums, and time and memory of the solution."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=9)
    parser.add_argument("--dim", type=int, default=1111)
    parser.add_argument("--classes", type=int, default=309)
    parser.add_argument("--clips", type=int, default=183_730)
    parser.add_argument("--summed", type=int, default=16_384)
    parser.add_argument("--noise", type=float, default=4.0)
    parser.add_argument(
        "--informative", type=int, default=1, help="tokens that depend on the class; fewer, more rounds"
    )
    parser.add_argument("--float64", action="store_true", help="no rounds in float32")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    size = arguments.tokens * arguments.dim + 1
    made: list[FeatureSums] = []
    wall, processor = timed(
        lambda: made.append(
            sums_of(
                arguments.tokens,
                arguments.dim,
                arguments.classes,
                arguments.summed,
                arguments.noise,
                arguments.informative,
            )
        )
    )
    scale = arguments.clips / arguments.summed
    print(f"F = {size}; sums of {arguments.clips} clips: {wall * scale:.0f} s, processor {processor * scale:.0f} s")
    totals = made[0].total()
    for values in totals.values():
        values *= scale
    state = sum(values.nbytes for values in totals.values())
    solver = RidgeSolver(totals)
    blocks = [slice(number * arguments.dim, (number + 1) * arguments.dim) for number in range(arguments.tokens)]
    rounds, ridges = {"float32": 0, "float64": 0}, []
    inverse_diagonal = RidgeSolver.inverse_diagonal

    def counted(own: RidgeSolver) -> torch.Tensor:
        rounds[str(own.matrix.dtype).removeprefix("torch.")] += 1
        return inverse_diagonal(own)

    RidgeSolver.inverse_diagonal = counted  # type: ignore[method-assign]
    if arguments.float64:
        feature_sums.SINGLE_FROM = size + 1
    by_round = timed(lambda: ridges.append(evidence_ridge(solver, blocks)))
    by_factor = timed(lambda: (factorize(solver, ridges[0]), solver.solution()))
    for name, (wall, processor) in (("evidence", by_round), ("head", by_factor)):
        print(f"{name}: {wall:.1f} s, processor {processor:.1f} s")
    print(f"rounds {rounds}; sums {state / 1e6:.0f} MB; peak memory of the process {megabytes('VmHWM'):.0f} MB")


if __name__ == "__main__":
    main()
