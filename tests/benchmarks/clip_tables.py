"""Clip tables of a very large data set: `python -m tests.benchmarks.clip_tables`. There are no shards behind them.

The manifest is written once. Then new processes, ranks of a large job on one node, open it one after the other, plan an
epoch, and begin again in its middle. Memory is what a process does not share with others: that of the operating system
(USS), less the memory of the process before it opened the manifest.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_table import ClipTable
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.data.shard import MEMBERS, Shard
from avcil_dist.world import World
from tests.helpers.old_manifests import save_old

SIZES = {"visual.npy": 2_408_576, "audio.npy": 1_664, "json": 120}
BLOCK = 512
KEY_DIGITS, KEY_END = 11, b"_000030\n"
BATCHES_READ = 100


def make_manifest(clips: int, shards: int, classes: int) -> Manifest:
    """Return a manifest of feature shards of equal size, with keys like VGGSound's."""
    count = clips // shards
    numbers = np.arange(count * shards)
    keys = np.empty((len(numbers), KEY_DIGITS + len(KEY_END)), np.uint8)
    keys[:, KEY_DIGITS:] = np.frombuffer(KEY_END, np.uint8)
    for place in range(KEY_DIGITS):
        keys[:, place] = numbers // 10 ** (KEY_DIGITS - 1 - place) % 10 + ord("0")
    columns = {"keys": keys.ravel(), "key_ends": ((numbers + 1) * keys.shape[1]).astype(np.uint32)}
    starts = np.cumsum([BLOCK, *(BLOCK + -(-size // BLOCK) * BLOCK for size in SIZES.values())])
    rows = (numbers % count * int(starts[-1])).astype(np.int64)
    for member, start in zip(SIZES, starts[:-1], strict=True):
        columns[f"offset.{member}"] = rows + int(start)
        columns[f"size.{member}"] = np.full(len(numbers), SIZES[member], np.uint32)
    table, members = ClipTable(columns), tuple(sorted(MEMBERS["feature"]))
    names = tuple(f"class {number:03d}" for number in range(classes))
    found = []
    for number in range(shards):
        name = names[number * classes // shards]
        url, sha256 = f"train/{name[-3:]}-{number:05d}.tar", f"{number:064x}"
        size = count * int(starts[-1]) + 2 * BLOCK
        found.append(Shard(url, name, "train", size, sha256, count, members, table, number * count))
    return Manifest("feature", names, tuple(found), {"frames": 8, "positions": 196, "dim": 768})


@contextmanager
def measured(name: str, results: dict[str, float]) -> Iterator[None]:
    """Measure seconds of the clock and of the processor, and the private memory above the first measurement, in MB."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    results[f"{name} clock"] = time.perf_counter() - clock
    results[f"{name} processor"] = time.process_time() - processor
    results[f"{name} private"] = private_memory() - results["before"]


def private_memory() -> float:
    """Return the memory that only this process has, in MB."""
    return psutil.Process().memory_full_info().uss / 1e6


def be_rank(url: str, rank: int, arguments: argparse.Namespace, pipe: Connection) -> None:
    """Open the manifest; when the pipe asks for it, plan an epoch and begin in its middle."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(Path(url).parent)
    results = {"before": private_memory()}
    with measured("open", results):
        manifest = load_manifest(url)
    pipe.send(results)
    pipe.recv()
    sampler = TrainingSampler(
        manifest=manifest,
        classes=manifest.classes,
        exemplars=np.empty(0, np.int64),
        data=DataConfig(manifest=url, canonical_nodes=arguments.nodes),
        optim=OptimConfig(global_batch=arguments.batch, epochs=2),
        seed=0,
        step=0,
        world=World(rank=rank, size=arguments.ranks, local_rank=rank % 8, local_size=8),
    )
    with peak("plan", results), measured("plan", results):
        planned = sampler.epoch_batches(0)
    with measured("resume", results):
        middle = sampler.batches_per_epoch // 2
        requests = iter(replace(sampler, start=middle))
        request = next(requests)
        np.testing.assert_array_equal(request.clips, planned[middle])
        manifest.spans("visual.npy", request.clips)
    with measured("read", results):
        for _ in range(BATCHES_READ):
            clips = next(requests).clips
            manifest.spans("visual.npy", clips)
            [manifest.key(int(clip)) for clip in clips]
    results["batches"], results["rows"] = planned.shape
    pipe.send(results)
    pipe.recv()  # the others are measured while this process still maps the table


@contextmanager
def peak(name: str, results: dict[str, float]) -> Iterator[None]:
    """Measure the highest memory during the block above that before, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield
    results[f"{name} peak"] = _status("VmHWM") - before


def _status(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e6


def measure_ranks(url: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return the figures of the first, a middle and the last rank. The first one verifies the table for all."""
    context = multiprocessing.get_context("spawn")
    numbers = sorted({0, arguments.ranks // 2, arguments.ranks - 1})
    pipes, results = [], []
    for number in numbers:
        here, there = context.Pipe()
        context.Process(target=be_rank, args=(url, number, arguments, there), daemon=True).start()
        results.append(here.recv())
        pipes.append(here)
    for place, pipe in enumerate(pipes):
        pipe.send("plan")
        results[place] = pipe.recv()
    for pipe in pipes:
        pipe.send("end")
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=20_000_000)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8192, help="clips of a global batch")
    parser.add_argument("--nodes", type=int, default=128, help="data.canonical_nodes")
    parser.add_argument("--old", action="store_true", help="write a manifest of format 1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="avcil-clip-tables-") as folder:
        url = f"{folder}/manifest.json"
        manifest = make_manifest(arguments.clips, arguments.shards, arguments.classes)
        started = time.perf_counter()
        if arguments.old:
            save_old(manifest, url)
        else:
            manifest.save(url)
        written = time.perf_counter() - started
        del manifest
        sizes = ", ".join(f"{path.stat().st_size / 1e6:.0f} MB" for path in sorted(Path(folder).iterdir()))
        print(f"{arguments.clips:,} clips in {arguments.shards:,} shards, written in {written:.0f} s: {sizes}")
        results = measure_ranks(url, arguments)
    first, *others = results
    batches, rows = int(first["batches"]), int(first["rows"])
    print(
        f"{arguments.ranks:,} ranks: {batches:,} batches an epoch, {rows} clips each of a rank; seconds (processor), MB"
    )
    print(f"{'':32} {'clock':>8} {'processor':>10} {'private':>8}")
    figures = [("open, first process of a node", "open", [first]), ("open, any other process", "open", others)]
    figures += [("plan an epoch", "plan", results), ("begin in the middle of an epoch", "resume", results)]
    figures += [(f"places and keys, {BATCHES_READ} batches", "read", results)]
    for title, name, rank_results in figures:
        most = [max(found[f"{name} {kind}"] for found in rank_results) for kind in ("clock", "processor", "private")]
        print(f"{title:32} {most[0]:8.2f} {most[1]:10.2f} {most[2]:8.1f}")
    print(f"peak of the plan: {max(found['plan peak'] for found in results):.0f} MB more than before")


if __name__ == "__main__":
    main()
