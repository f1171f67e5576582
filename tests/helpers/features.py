"""The small feature data sets of the tests."""

from pathlib import Path

from avcil_dist.data.manifest import load_manifest
from data_shards.random_features import clip_key, make_feature_shards

__all__ = ["clip_key", "damage", "make_feature_shards"]


def damage(folder: Path, key: str) -> None:
    """Overwrite one clip's visual features in its shard."""
    manifest = load_manifest(f"{folder}/manifest.json")
    for number, shard in enumerate(manifest.shards):
        if key in shard.keys:
            row = shard.keys.index(key)
            path = Path(manifest.url(number))
            data = bytearray(path.read_bytes())
            start, size = shard.offsets["visual.npy"][row], shard.sizes["visual.npy"][row]
            data[start : start + size] = bytes(int(size))
            path.write_bytes(data)
