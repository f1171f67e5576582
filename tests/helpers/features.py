"""Faults in feature shards."""

from pathlib import Path

from avcil_dist.data.manifest import load_manifest


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
