"""Feature sets that separate methods: `python -m tests.benchmarks.feature_sets FOLDER` writes three with their configs.

A clip has a sound and eight frames of four positions, D = 64. Its class is a part of what varies: clips also differ in
their own direction within a subspace that all classes share (nuisance), and in noise.

`still`: each frame has the class's mean. `frames`: the frames have the means of eight parts, in an order and choice of
the class, so a sum over time says little. `sound`: classes share pictures in pairs and sounds in other pairs, so
neither is enough alone.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import SPLITS, Split
from avcil_dist.seeds import generator
from data_shards.shard_writer import feature_members, shard_url, write_shard

CLASSES, PER_STEP, FRAMES, POSITIONS, DIM = 24, 4, 8, 4, 64
CLIPS: dict[Split, int] = {"train": 60, "val": 10, "test": 30}
NUISANCE, RANK, NOISE = 1.5, 12, 1.0
KINDS = {"still": 0.16, "frames": 0.35, "sound": 0.24}  # and the length of class means


def class_means(kind: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean sound (D,) and the mean tokens (frames, positions, D) of a class."""
    scale = KINDS[kind]

    def drawn(purpose: str, *which: int) -> np.ndarray:
        return scale * generator(0, purpose, *which).standard_normal(DIM)

    if kind == "frames":
        chosen = generator(0, "order", number).integers(0, FRAMES, FRAMES)
        frames = np.stack([drawn("part", int(part)) for part in chosen])
        return 0.3 * drawn("sound", number), np.repeat(frames[:, None], POSITIONS, axis=1)
    half = CLASSES // 2
    picture, sound = (number % half, (number * 5 % CLASSES) // 2) if kind == "sound" else (number, number)
    place = generator(0, "place", picture).standard_normal((1, POSITIONS, 1))
    return drawn("sound", sound), np.repeat(drawn("picture", picture) * (1 + 0.5 * place), FRAMES, axis=0)


def clips(kind: str, number: int, split: Split) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each clip of a class."""
    sound, tokens = class_means(kind, number)
    shared = generator(0, "nuisance").standard_normal((2, RANK, DIM)) / np.sqrt(RANK)
    for row in range(CLIPS[split]):
        random = generator(0, "clip", kind, number, split, row)
        own = NUISANCE * random.standard_normal((2, RANK))
        audio = sound + own[0] @ shared[0] + 0.5 * NOISE * random.standard_normal(DIM)
        visual = tokens + own[1] @ shared[1] + NOISE * random.standard_normal(tokens.shape)
        key = f"{split}-{number:03d}-{row:05d}"
        metadata = {"label": f"class_{number:03d}", "split": split, "source": key, "start": 0.0, "duration": 1.0}
        yield key, feature_members(visual.reshape(-1, DIM), audio, metadata)


def make_set(folder: Path, kind: str) -> Path:
    """Write the shards of a set and its configuration; return the configuration's path."""
    root, names = folder / kind, tuple(f"class_{number:03d}" for number in range(CLASSES))
    shards = tuple(
        write_shard(
            shard_url(split, number, name, 0),
            root=str(root),
            class_name=name,
            split=split,
            clips=clips(kind, number, split),
        )
        for number, name in enumerate(names)
        for split in SPLITS
    )
    shape = {"frames": FRAMES, "positions": POSITIONS, "dim": DIM}
    Manifest("feature", names, shards, shape, root=str(root)).save(f"{root}/manifest.json")
    document = {
        "extends": "base",
        "name": kind,
        "output": str(folder / "runs"),
        "data": {"manifest": f"{root}/manifest.json"},
        "scenario": {"classes_per_step": PER_STEP},
        "model": {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}},
        "memory": {"size": 5 * CLASSES},
        "optim": {"epochs": 30, "global_batch": 48, "global_replay_batch": 24, "global_eval_batch": 240},
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def main() -> None:
    """Make the sets, and print the path of each one's configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for kind in KINDS:
        print(make_set(arguments.folder, kind))


if __name__ == "__main__":
    main()
