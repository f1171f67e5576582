"""Feature shards of random numbers whose classes a linear map separates, for trials and measurements."""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import SPLITS, Shard, Split
from avcil_dist.seeds import generator
from data_shards.shard_writer import shard_url, write_shard

MAX_THREADS = 16  # each writes one shard


def clip_key(split: Split, number: int, row: int) -> str:
    """The key of clip `row` of class `number`; each clip is its own source video."""
    return f"{split}-{number:03d}-{row:05d}"


def make_feature_shards(
    folder: Path,
    *,
    classes: int,
    clips: Mapping[Split, int],
    frames: int = 2,
    positions: int = 3,
    dim: int = 16,
    seed: int = 0,
    separation: float = 3.0,
    clips_per_shard: int = 16,
    key: Callable[[Split, int, int], str] = clip_key,
) -> str:
    """Write feature shards of class prototypes plus unit noise; return the path of their manifest.

    `clips` are per class; prototypes are normal with deviation `separation` (0: nothing can be learned).
    """
    names = tuple(f"class_{number:03d}" for number in range(classes))

    def write(number: int, split: Split, first: int) -> Shard:
        rows = range(first, min(first + clips_per_shard, clips[split]))
        return write_shard(
            shard_url(split, number, names[number], first // clips_per_shard),
            root=str(folder),
            class_name=names[number],
            split=split,
            clips=_clips(number, names[number], split, rows, (frames * positions, dim), seed, separation, key),
        )

    wanted = [
        (number, split, first)
        for number in range(classes)
        for split in SPLITS
        for first in range(0, clips.get(split, 0), clips_per_shard)
    ]
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:  # numpy draws without the lock
        shards = tuple(pool.map(write, *zip(*wanted, strict=True)))
    shape = {"frames": frames, "positions": positions, "dim": dim}
    url = f"{folder}/manifest.json"
    Manifest(kind="feature", classes=names, shards=shards, shape=shape, root=str(folder)).save(url)
    return url


def _clips(
    number: int,
    name: str,
    split: Split,
    rows: range,
    tokens_dim: tuple[int, int],
    seed: int,
    separation: float,
    key_of: Callable[[Split, int, int], str],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    tokens, dim = tokens_dim
    prototypes = generator(seed, "prototype", number).normal(0, separation, (2, dim))
    for row in rows:
        random = generator(seed, "clip", number, split, row)
        visual = prototypes[0] + random.normal(size=(tokens, dim))
        audio = prototypes[1] + random.normal(size=dim)
        key = key_of(split, number, row)
        metadata = {"label": name, "split": split, "source": key, "start": 0.0, "duration": 1.0}
        yield (
            key,
            {
                "visual.npy": _npy(visual),
                "audio.npy": _npy(audio),
                "json": json.dumps(metadata, sort_keys=True).encode(),
            },
        )


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values.astype(np.float16), allow_pickle=False)
    return buffer.getvalue()
