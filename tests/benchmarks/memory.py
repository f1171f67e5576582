"""Peak host memory of a rank by ZeRO stage: `python -m tests.benchmarks.memory`.

Two processes train a transformer on frames of noise, new ones for each stage. The peak is VmHWM of the operating
system, less the memory of the process before the network was built.
"""

import argparse
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig
from avcil_dist.models.network import build_network
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

CLIP = ClipConfig(frames=2, size=32, mel_bins=16, mel_frames=32)
ROWS, ITERATIONS = 2, 3


class Peak(NamedTuple):
    """Memory of one rank above that before the network, in MB: peak and end of building and of training."""

    building: float
    built: float
    training: float
    trained: float
    num_parameters: int


def megabytes(field: str) -> float:
    """Return a field of the kernel's statistics of this process's memory, in MB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def measure(world: World, stage: int, dim: int, depth: int) -> Peak:
    """Train a few iterations."""
    import deepspeed  # noqa: F401 - loaded first, so that its memory is not counted

    before = megabytes("VmRSS")
    sizes = {"weights": "random", "train": "full", "dim": dim, "depth": depth, "heads": 8}
    model = ModelConfig.model_validate(
        {"visual": {"kind": "videomae", **sizes}, "audio": {"kind": "small", "dim": dim}}
    )
    network = build_network(model, CLIP, {}, 10)
    count = sum(parameter.numel() for parameter in network.parameters())
    config = EngineConfig(zero_stage=stage)
    engine = Engine(network, build_optimizer(network, OptimConfig()), config=config, rows=ROWS, world=world, device=CPU)
    building = megabytes("VmHWM")
    held = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    for _ in range(ITERATIONS):
        output = engine(torch.randn(ROWS, 2, 3, 32, 32), torch.randn(ROWS, 32, 16))
        engine.backward(output.logits.square().mean())
        engine.step()
    return Peak(*(value - before for value in (building, held, megabytes("VmHWM"), megabytes("VmRSS"))), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    given = parser.parse_args()
    # Freed memory is returned to the system at once; otherwise the peak includes the allocator's reserves.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="262144", MALLOC_TRIM_THRESHOLD_="262144", MALLOC_ARENA_MAX="1")
    rows = []
    for stage in given.stages:
        peaks = run_ranks(measure, 2, stage, given.dim, given.depth)
        rows.append((stage, [max(values) for values in zip(*peaks, strict=True)]))
    print(f"{rows[0][1][4] / 1e6:.1f} million parameters, float32, 2 processes; host memory of a rank, MB")
    print("| ZeRO | peak of building | built | peak of training | trained |\n|---|---|---|---|---|")
    for stage, values in rows:
        print(f"| {stage} | {' | '.join(f'{value:.0f}' for value in values[:4])} |")


if __name__ == "__main__":
    main()
