"""Time that a snapshot takes from training, as a share of an iteration: `python -m tests.benchmarks.snapshots`.

Processes train a transformer on frames of noise and write snapshots to a local folder. `stall` is the time that the
training spends on a snapshot before its next iteration; both are processor time of the training's thread, so that other
programs do not count. `written` is the time by the clock until the snapshot is committed.
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
        started = time.thread_time()
        output = engine(torch.randn(rows, 8, 3, 112, 112), torch.randn(rows, 128, 64))
        engine.backward(output.logits.square().mean())
        engine.step()
        return time.thread_time() - started

    iterate()
    iterations, stalls, written = [], [], []
    for number in range(num_snapshots):
        iterations.append(iterate())
        began, started = time.perf_counter(), time.thread_time()
        snapshots.save(engine, TrainingState(iteration=number + 1), EpochTotals().to_dict({}, []))
        stalls.append(time.thread_time() - started)
        snapshots.finish()
        written.append(time.perf_counter() - began)
    snapshots.close()
    engine.close()
    return Times(
        statistics.median(iterations), statistics.median(stalls), statistics.median(written), num_parameters=count
    )


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
    print(f"{rows[0][1][3] / 1e6:.1f} million parameters, {given.ranks} processes; medians of {given.snapshots}, ms")
    print("| ZeRO | iteration | stall | share | written |\n|---|---|---|---|---|")
    for stage, (iteration, stall, written, _) in rows:
        numbers = f"{1e3 * iteration:.0f} | {1e3 * stall:.1f} | {stall / iteration:.1%}"
        print(f"| {stage} | {numbers} | {1e3 * written:.0f} |")


if __name__ == "__main__":
    main()
