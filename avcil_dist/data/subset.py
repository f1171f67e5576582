"""Subset of a data set: at most so many clips of each class and split, the first ones of the manifest."""

from collections import Counter
from dataclasses import replace

import numpy as np

from avcil_dist import storage
from avcil_dist.config.schema import DataConfig, LimitConfig
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.shard import Split
from avcil_dist.errors import DataError


def load_data(data: DataConfig) -> Manifest:
    """Return the manifest of `data.manifest`, within `data.limit`.

    Raises DataError as `load_manifest` does; for a missing one it has the command that makes the data.
    """
    try:
        manifest = load_manifest(data.manifest, data)
    except DataError:
        if data.made_by is None or storage.exists(data.manifest):
            raise
        raise DataError(f"{data.manifest}: missing; the data of this benchmark are made by: {data.made_by}") from None
    return limited(manifest, data.limit)


def limited(manifest: Manifest, limit: LimitConfig) -> Manifest:
    """Return the manifest with at most `limit` clips of each class and split; the shards' files stay as they are."""
    if limit == LimitConfig():
        return manifest
    taken: Counter[tuple[str, Split]] = Counter()
    shards = []
    for shard in manifest.shards:
        most = getattr(limit, shard.split)
        group = shard.class_name, shard.split
        rows = shard.count if most is None else min(shard.count, most - taken[group])
        taken[group] += rows
        if rows:
            shards.append(shard.of_rows(np.arange(rows)))
    return replace(manifest, shards=tuple(shards))
