"""Cost of the kernel's approximation: `python -m tests.benchmarks.kernel --clips 8000 --landmarks 500 1000 2000 4000`.

Clips are tokens of noise around means of their class, of which each class has several, so that more landmarks have more
of them. The table has time and peak memory of the solution by one process, the accuracy on new clips, and the share of
these clips with another prediction than that of the exact solution. The exact one is the first row; with --approximate
it is left out, and the shares are those to the last number of landmarks.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from avcil_dist.methods.base import StepContext
from avcil_dist.methods.kernel import Kernel
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from tests.benchmarks.memory import megabytes

BATCH, GROUPS = 512, 12  # clips at a time, means of a class


class Data:
    """Clips of a seed: sound (B, D) and pictures (B, cells, D)."""

    def __init__(self, given: argparse.Namespace) -> None:
        random = torch.Generator().manual_seed(0)
        self.given = given
        self.means = torch.randn(given.classes * GROUPS, 1 + given.cells, given.dim, generator=random)

    def batches(self, count: int, seed: int) -> list[tuple[Output, Tensor]]:
        """Return outputs and labels of `count` clips."""
        random, found = torch.Generator().manual_seed(seed), []
        for first in range(0, count, BATCH):
            which = torch.randint(len(self.means), (min(BATCH, count - first),), generator=random)
            tokens = self.means[which]
            tokens = tokens + self.given.noise * torch.randn(tokens.shape, generator=random)
            output = Output(torch.zeros(len(which), 0), tokens[:, 0], tokens[:, 1:])
            found.append((output, which % self.given.classes))
        return found


def main() -> None:
    """Print a row for the exact solution, and one for each number of landmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=40)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--noise", type=float, default=6.0)
    parser.add_argument("--landmarks", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--approximate", action="store_true", help="no exact solution")
    given = parser.parse_args()
    data = Data(given)
    trained, tested = data.batches(given.clips, 1), data.batches(given.tests, 2)
    labels = torch.cat([own for _, own in tested])
    scenario = Scenario((tuple(map(str, range(given.classes))),))
    rows = []
    for number in [*([] if given.approximate else [0]), *given.landmarks]:
        limit = 1 if number else given.clips
        method = Kernel(Kernel.Options(max_clips=limit, landmarks=number))
        method.begin_step(StepContext(scenario, 0))
        for output, own in trained:
            method.accumulate(output, own)
        method.statistics()
        held = megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        begun = time.perf_counter()
        method.choose(method.solve(), [])
        seconds, peak = time.perf_counter() - begun, megabytes("VmHWM") - held
        predicted = torch.cat([method.scores(output).argmax(dim=1) for output, _ in tested])
        rows.append((number or "exact", seconds, peak, predicted))
    reference = rows[-1 if given.approximate else 0][3]
    print(f"N = {given.clips}, F = {(1 + given.cells) * given.dim}, {torch.get_num_threads()} threads")
    print("| landmarks | solution, s | peak, MB | accuracy, % | other predictions, % |\n|---|---|---|---|---|")
    for name, seconds, peak, predicted in rows:
        accuracy, others = (predicted == labels).double().mean(), (predicted != reference).double().mean()
        print(f"| {name} | {seconds:.1f} | {peak:.0f} | {100 * accuracy:.1f} | {100 * others:.1f} |")


if __name__ == "__main__":
    main()
