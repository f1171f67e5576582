"""Time that a snapshot takes from training, as a share of an iteration: `python -m tests.benchmarks.snapshots`.

Processes train a transformer on frames of noise and write snapshots to a local folder. The stall is the time that the
training spends on a snapshot before its next iteration. Its share of an iteration is measured by the clock, and by the
processor time of the training's thread, in which other programs do not count. The iteration beside it runs while the
snapshot is written; the commit is after that iteration.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig
from avcil_dist.data.manifest import load_manifest
from avcil_dist.models.network import build_network
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.engine import Engine
from avcil_dist.training.incremental_step import make_step
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.snapshot import SnapshotManager
from avcil_dist.training.training_state import EpochTotals, TrainingState
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config

CLIP = ClipConfig(frames=8, size=112, mel_bins=64, mel_frames=128)


class Seconds(NamedTuple):
    """Time by the clock, and processor time of this thread."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        """Return both times."""
        return cls(time.perf_counter(), time.thread_time())

    def passed(self) -> "Seconds":
        """Return the time since then."""
        now = Seconds.now()
        return Seconds(now.clock - self.clock, now.processor - self.processor)


class Times(NamedTuple):
    """Medians of seconds, shares of the stall in an iteration, and the number of parameters."""

    iteration: float
    stall: float
    share: float
    share_of_processor: float
    beside: float
    committed: float
    num_parameters: int


def measure(world: World, stage: int, sizes: tuple[int, int], rows: int, num_snapshots: int, config: Path) -> Times:
    """Alternate iterations without and with a snapshot that is being written."""
    settings = load_config(str(config), [f"output={config.parent}/{stage}", f"engine.zero_stage={stage}"])
    manifest = load_manifest(settings.data.manifest)
    step = make_step(settings, manifest, scenario_of(settings, manifest), 0, None, world=world, device=CPU)
    snapshots = SnapshotManager(step)
    encoder = {"weights": "random", "train": "full", "dim": sizes[0], "depth": sizes[1], "heads": 8}
    model = {"visual": {"kind": "videomae", **encoder}, "audio": {"kind": "audiomae", **encoder}}
    network = build_network(ModelConfig.model_validate(model), CLIP, {}, 10)
    count = sum(parameter.numel() for parameter in network.parameters())
    engine = Engine(
        network,
        build_optimizer(network, OptimConfig()),
        config=EngineConfig(zero_stage=stage),
        rows=rows,
        world=world,
        device=CPU,
    )

    def iterate() -> Seconds:
        started = Seconds.now()
        output = engine(torch.randn(rows, 8, 3, 112, 112), torch.randn(rows, 128, 64))
        engine.backward(output.logits.square().mean())
        engine.step()
        return started.passed()

    iterate()
    iterations, stalls, beside, committed = [], [], [], []
    for number in range(num_snapshots):
        iterations.append(iterate())
        began = Seconds.now()
        snapshots.save(engine, TrainingState(iteration=number + 1), EpochTotals().to_dict({}, []))
        stalls.append(began.passed())
        beside.append(iterate())
        snapshots.finish()
        committed.append(began.passed())
    snapshots.close()
    engine.close()
    iteration, stall, while_written, until_commit = map(medians, (iterations, stalls, beside, committed))
    shares = stall.clock / iteration.clock, stall.processor / iteration.processor
    return Times(iteration.clock, stall.clock, *shares, while_written.clock, until_commit.clock, count)


def medians(times: list[Seconds]) -> Seconds:
    """Return the median of each of both times."""
    return Seconds(*map(statistics.median, zip(*times, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="clips of a rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--snapshots", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder))
        sizes = given.dim, given.depth
        for stage in given.stages:
            times = run_ranks(measure, given.ranks, stage, sizes, given.rows, given.snapshots, config)
            rows.append((stage, Times(*(max(values) for values in zip(*times, strict=True)))))
    millions = rows[0][1].num_parameters / 1e6
    print(f"{millions:.1f} million parameters, {given.ranks} processes; medians of {given.snapshots}")
    print("| ZeRO | iteration | stall | of the iteration | by processor time | iteration beside | committed after |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for stage, found in rows:
        durations = f"{1e3 * found.iteration:.0f} ms | {1e3 * found.stall:.1f} ms"
        shares = f"{100 * found.share:.1f} % | {100 * found.share_of_processor:.1f} %"
        print(f"| {stage} | {durations} | {shares} | {1e3 * found.beside:.0f} ms | {found.committed:.2f} s |")


if __name__ == "__main__":
    main()
