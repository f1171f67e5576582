"""Peak host memory of a rank by ZeRO stage: `python -m tests.benchmarks.memory`.

Two processes train a transformer on frames of noise, new ones for each stage. The peak is VmHWM of the operating
system, less the memory of the process before the network was built.

With `--copies` nothing is trained: the table has the host memory of a node for the copies of the weights that a step
makes beside its network, once if each rank has whole ones, and as they are. It is the sum over the ranks of the
proportional set size (Pss), in which memory that ranks share counts once.
"""

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, EngineConfig
from avcil_dist.models.network import Network, build_network
from avcil_dist.streams.tensors import write_tensors
from avcil_dist.training.collectives import gather_json
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.weight_average import WeightAverage
from avcil_dist.training.weights import gather_whole, to_host, weight_parts, whole_forms, whole_state
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks

CLIP = ClipConfig(frames=2, size=32, mel_bins=16, mel_frames=32)
ROWS, ITERATIONS = 2, 3
COPIES = ("best epoch", "snapshot of the weights", "weights at the end", "moving average")


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


def transformer(dim: int, depth: int) -> Network:
    """Return a network with a transformer on frames."""
    sizes = {"weights": "random", "train": "full", "dim": dim, "depth": depth, "heads": 8}
    model = ModelConfig.model_validate(
        {"visual": {"kind": "videomae", **sizes}, "audio": {"kind": "small", "dim": dim}}
    )
    return build_network(model, CLIP, {}, 10)


def measure(world: World, stage: int, dim: int, depth: int) -> Peak:
    """Train a few iterations."""
    import deepspeed  # noqa: F401 - loaded first, so that its memory is not counted

    before = megabytes("VmRSS")
    network = transformer(dim, depth)
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


def pss() -> float:
    """Return this process's memory in MB, in which its share of common pages counts."""
    found = re.search(r"Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found
    return int(found[1]) / 1024


def node_sum(world: World, values: list[float]) -> list[float]:
    """Return the sums over the ranks."""
    return [sum(column) for column in zip(*gather_json(values), strict=True)]


def measure_copies(world: World, dim: int, depth: int, folder: str) -> tuple[list[float], list[float], int]:
    """The memory of the node for the rows of `COPIES`: before, and now."""
    network = transformer(dim, depth)
    forms, count = whole_forms(network), sum(parameter.numel() for parameter in network.parameters())
    empty = pss()
    best = whole_state(network)
    with_best = pss()
    written = whole_state(network)
    data = safetensors.torch.save(written) if world.is_main else b""
    with_snapshot = pss()
    del written, data
    whole = {name: value.clone() for name, value in best.items()}
    before = [with_best - empty, with_snapshot - with_best, pss() - with_best]
    del best, whole
    empty = pss()
    average = {name: value.detach().clone() for name, value in network.named_parameters()}
    before.append(pss() - empty)
    del average
    gather_json(None)
    empty = pss()
    parts = to_host(weight_parts(network, world))
    with_best = pss()
    copies = to_host(weight_parts(network, world))
    write_tensors(f"{folder}/{world.rank}.safetensors", copies)
    with_snapshot = pss()
    del copies
    state = gather_whole(parts, forms, CPU, world)
    now = [with_best - empty, with_snapshot - with_best, pss() - with_best]
    assert len(state) == len(forms)
    empty = pss()
    own = WeightAverage(network, 0.9, world)
    now.append(pss() - empty)
    assert own.parts()
    gather_json(None)
    return node_sum(world, before), node_sum(world, now), count


def print_copies(dim: int, depth: int, ranks: int) -> None:
    """Measure and print the table of copies."""
    with tempfile.TemporaryDirectory() as folder:
        before, now, count = run_ranks(measure_copies, ranks, dim, depth, folder)[0]
    print(f"{count / 1e6:.1f} million parameters, float32, {ranks} ranks of a node; host memory of the node, MB")
    print("| copy | whole on each rank | now |\n|---|---|---|")
    for name, *values in zip(COPIES, before, now, strict=True):
        print(f"| {name} | {' | '.join(f'{value:.0f}' for value in values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--copies", action="store_true", help="measure the copies of the weights")
    parser.add_argument("--ranks", type=int, default=2, help="of --copies")
    given = parser.parse_args()
    # Freed memory is returned to the system at once; otherwise the peak includes the allocator's reserves.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="262144", MALLOC_TRIM_THRESHOLD_="262144", MALLOC_ARENA_MAX="1")
    if given.copies:
        print_copies(given.dim, given.depth, given.ranks)
        return
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
