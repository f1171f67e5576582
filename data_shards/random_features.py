"""Feature shards of random numbers whose classes a linear map separates, for trials and measurements."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import SPLITS, Split
from avcil_dist.seeds import generator
from data_shards.shard_writer import shard_url, write_shard


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
    shards = []
    for number, name in enumerate(names):
        for split in SPLITS:
            for first in range(0, clips.get(split, 0), clips_per_shard):
                rows = range(first, min(first + clips_per_shard, clips[split]))
                shards.append(
                    write_shard(
                        shard_url(split, number, name, first // clips_per_shard),
                        root=str(folder),
                        class_name=name,
                        split=split,
                        clips=_clips(number, name, split, rows, (frames * positions, dim), seed, separation, key),
                    )
                )
    shape = {"frames": frames, "positions": positions, "dim": dim}
    url = f"{folder}/manifest.json"
    Manifest(kind="feature", classes=names, shards=tuple(shards), shape=shape, root=str(folder)).save(url)
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
