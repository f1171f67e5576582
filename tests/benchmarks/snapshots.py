"""Time that a snapshot takes from training, as a share of an iteration: `python -m tests.benchmarks.snapshots`.

Processes train a transformer on frames of noise and write snapshots to a local folder. `stall` is the time in which the
training waits, from the beginning of a snapshot to its next iteration; `written` that until it is committed, for which
training waited before snapshots were written in the background. `slower` is the time that iterations lose to the thread
that writes, where it has no processor of its own.
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


class Times(NamedTuple):
    """Medians of seconds, and the number of parameters."""

    iteration: float
    stall: float
    written: float
    slower: float
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

    def iterate() -> float:
        started = time.perf_counter()
        output = engine(torch.randn(rows, 8, 3, 112, 112), torch.randn(rows, 128, 64))
        engine.backward(output.logits.square().mean())
        engine.step()
        return time.perf_counter() - started

    iterate()
    plain, stalls, written, loaded = [], [], [], []
    for number in range(num_snapshots):
        plain.append(iterate())
        started = time.perf_counter()
        snapshots.save(engine, TrainingState(iteration=number + 1), EpochTotals().to_dict({}, []))
        stalls.append(time.perf_counter() - started)
        loaded.append(iterate())
        snapshots.finish()
        again = time.perf_counter()
        snapshots.save(engine, TrainingState(iteration=num_snapshots + number + 1), EpochTotals().to_dict({}, []))
        snapshots.finish()
        written.append(time.perf_counter() - again)
    snapshots.close()
    engine.close()
    iteration = statistics.median(plain)
    slower = statistics.median(loaded) - iteration
    return Times(iteration, statistics.median(stalls), statistics.median(written), slower, count)


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
            rows.append((stage, [max(values) for values in zip(*times, strict=True)]))
    print(f"{rows[0][1][4] / 1e6:.1f} million parameters, {given.ranks} processes; medians of {given.snapshots}, ms")
    print("| ZeRO | iteration | stall | share | slower | written |\n|---|---|---|---|---|---|")
    for stage, (iteration, stall, written, slower, _) in rows:
        numbers = f"{1e3 * iteration:.0f} | {1e3 * stall:.1f} | {stall / iteration:.1%} | {1e3 * slower:.0f}"
        print(f"| {stage} | {numbers} | {1e3 * written:.0f} |")


if __name__ == "__main__":
    main()
