"""Program that measures loading: our batches beside the disk, other loaders, the S3 client and the decoder.

It is not a test, and lives here because it uses the S3 server of the tests. Run it on a quiet machine:

    python -m tests.benchmarks.loader --clips 768 --folder FOLDER

FOLDER needs about 4 times the size of the data (768 clips: 1.9 GB). The data are removed at the end.
"""

import argparse
import io
import os
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
import webdataset
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from avcil_dist.data.manifest import Manifest, load_manifest
from launch.bench.loader import SHARDS, best_rate, make_shards, our_batches, our_rates, rate, read_in_sequence
from tests.helpers.s3 import BUCKET, S3Server, find_rclone
from tests.services.storage.conftest import ENVIRONMENT, forget_filesystems

FRAMES, POSITIONS, DIM, BATCH = 8, 196, 768, 32
CORES = len(os.sched_getaffinity(0))

Row = tuple[str, float, str]


def read_at_random(manifest: Manifest) -> float:
    """`preadv` of clips in random order, 2 threads, into one batch."""
    files = [os.open(manifest.url(number), os.O_RDONLY) for number in range(len(manifest.shards))]
    clips = np.random.default_rng(0).permutation(int(manifest.first_clips[-1]))
    starts, sizes = manifest.spans("visual.npy", clips)
    shards = manifest.shards_of(clips)
    batch = np.zeros((BATCH, int(sizes[0])), dtype=np.uint8)

    def read(rows: Iterable[int]) -> int:
        return sum(os.preadv(files[shards[row]], [batch[row % BATCH].data], int(starts[row])) for row in rows)

    with ThreadPoolExecutor(2) as threads:
        total = sum(threads.map(read, np.array_split(np.arange(len(clips)), len(clips) // (BATCH // 2))))
    for file in files:
        os.close(file)
    return total / 1e9


def read_as_tar(paths: list[Path]) -> float:
    total = 0
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                total += len(file.read()) if file else 0
    return total / 1e9


def bytes_of(batches: Iterable[Any]) -> float:
    return sum(visual.nbytes for visual, *_ in batches) / 1e9


def webdataset_bytes(paths: list[Path], workers: int) -> float:
    urls = [str(path) for path in paths]
    clips = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(256).decode()
    batches = clips.to_tuple("visual.npy", "audio.npy").batched(BATCH)
    return bytes_of(DataLoader(batches, batch_size=None, num_workers=workers) if workers else batches)


def write_mds(manifest: Manifest, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"visual": f"ndarray:float16:{FRAMES * POSITIONS},{DIM}", "audio": f"ndarray:float16:{DIM}"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for number, shard in enumerate(manifest.shards):
            data, offsets = Path(manifest.url(number)).read_bytes(), shard.offsets
            for row in range(shard.count):
                members = (io.BytesIO(data[offsets[f"{name}.npy"][row] :]) for name in columns)
                writer.write(dict(zip(columns, map(np.load, members), strict=True)))


def mds_bytes(folder: Path, workers: int) -> float:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return bytes_of((batch["visual"],) for batch in DataLoader(dataset, batch_size=BATCH, num_workers=workers))


def feature_rows(folder: Path, clips: int, repeats: int) -> list[Row]:
    manifest = make_shards(folder / BUCKET / "shards", clips, FRAMES, POSITIONS, DIM)
    url = f"{folder}/{BUCKET}/shards/manifest.json"
    paths = [Path(manifest.url(number)) for number in range(len(manifest.shards))]
    read_in_sequence(paths)  # into the page cache
    rows: list[Row] = [
        ("sequential read()", best_rate(repeats, lambda: read_in_sequence(paths)), "GB/s"),
        ("preadv, random order, 2 threads, one batch", best_rate(repeats, lambda: read_at_random(manifest)), "GB/s"),
        ("tarfile, sequential", best_rate(repeats, lambda: read_as_tar(paths)), "GB/s"),
    ]
    for workers in (0, 2):
        measured_rate = rate(partial(webdataset_bytes, paths, workers))
        rows.append((f"webdataset: shuffle, decode, batch; {workers} workers", measured_rate, "GB/s"))
    rows += mds_rows(manifest, folder / "mds")
    measured = [our_rates(url, BATCH) for _ in range(repeats)]
    rows.append(("avcil-dist, first epoch of a process", max(first for first, _ in measured), "GB/s"))
    rows.append(("avcil-dist, epochs after it", max(later for _, later in measured), "GB/s"))
    rows.append(("sequential read(), once more", best_rate(repeats, lambda: read_in_sequence(paths)), "GB/s"))
    return rows


def mds_rows(manifest: Manifest, folder: Path) -> list[Row]:
    try:
        import streaming
    except ImportError:
        return [("MosaicML Streaming: not installed", float("nan"), "GB/s")]
    write_mds(manifest, folder)
    streaming.base.util.clean_stale_shared_memory()
    rows: list[Row] = []
    for workers in (0, 2):
        measured_rate = rate(partial(mds_bytes, folder, workers))
        rows.append((f"MosaicML Streaming: shuffled; {workers} workers", measured_rate, "GB/s"))
    shutil.rmtree(folder)
    return rows


def s3_rows(folder: Path, threads: int, repeats: int) -> list[Row]:
    if find_rclone() is None:
        return [("S3: rclone is not installed", float("nan"), "GB/s")]
    server = S3Server(folder)
    server.start()
    os.environ |= ENVIRONMENT | {"AWS_ENDPOINT_URL": server.endpoint}
    forget_filesystems()
    root = f"s3://{BUCKET}/shards"
    manifest = load_manifest(f"{root}/manifest.json")

    def whole_objects() -> float:
        plain = fsspec.filesystem("s3", skip_instance_cache=True)
        urls = [manifest.url(number) for number in range(len(manifest.shards))]
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda url: len(plain.cat_file(url)), urls)) / 1e9

    def ours(cache: str) -> float:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        url = f"{root}/manifest.json"
        return (
            sum(batch.visual.nbytes for batch in our_batches(url, 1, BATCH, shard_cache=cache, read_threads=threads))
            / 1e9
        )

    cache = str(folder / "cache")
    rows: list[Row] = [
        (f"s3fs, whole objects, {threads} at a time", best_rate(repeats, whole_objects), "GB/s"),
        ("avcil-dist from S3, first epoch, into the cache", best_rate(repeats, lambda: ours(cache)), "GB/s"),
        ("avcil-dist from S3, cache: none", best_rate(repeats, lambda: ours("none")), "GB/s"),
    ]
    server.kill()
    return rows


def main() -> None:
    """Measure all rates and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=256, help="feature clips, 2.4 MB each")
    parser.add_argument("--threads", type=int, default=8, help="requests to S3 at a time")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the best is reported")
    parser.add_argument("--folder", help="folder for temporary data; default: TMPDIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        rows = feature_rows(folder, arguments.clips, arguments.repeats)
        rows += s3_rows(folder, arguments.threads, arguments.repeats)
    size = f"{arguments.clips} clips of ({FRAMES * POSITIONS}, {DIM}) float16 in {SHARDS} shards, page cache"
    table = Table(title=f"{size}; {platform.machine()}, {CORES} cores, Python {platform.python_version()}")
    table.add_column("reader")
    table.add_column("rate", justify="right")
    for name, value, unit in rows:
        table.add_row(name, f"{value:.2f} {unit}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
