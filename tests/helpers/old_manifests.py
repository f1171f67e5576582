"""Manifests of format 1, as releases before the clip tables wrote them: one JSON file, with the clips of each shard."""

import json
from pathlib import Path

from avcil_dist.data.manifest import Manifest


def save_old(manifest: Manifest, url: str) -> None:
    """Write the manifest at `url` in format 1."""
    head = {"kind": manifest.kind, "classes": list(manifest.classes), "shape": manifest.shape}
    encoders = {} if manifest.encoders is None else {"encoders": manifest.encoders.model_dump()}
    content = {"format": 1, **head, **encoders, "shards": [shard.to_dict() for shard in manifest.shards]}
    Path(url).write_text(json.dumps({"content_hash": manifest.content_hash, **content}, sort_keys=True))
