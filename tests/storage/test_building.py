"""Shards built straight into a bucket, by parts and worker processes."""

from pathlib import Path

import torch

from avcil_dist import storage
from avcil_dist.compose import load_config
from data_shards.build import build_part, build_shards
from data_shards.features import make_features
from data_shards.parts import Part, merge_parts
from data_shards.verify import verify_shards
from tests.rendered import render_tiny
from tests.unit.test_feature_shards import TINY

SETTINGS = {"clips_per_shard": 2, "min_seconds": 0.5}


def test_parts_and_features_are_built_into_a_bucket(s3: str, tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    for index in range(2):
        assert build_part(source, f"{s3}/clips", Part(index, 2), processes=1, **SETTINGS) is None
        assert not storage.exists(f"{s3}/clips/manifest.json")
    built = merge_parts(f"{s3}/clips")
    local = build_shards(source, f"{tmp_path}/local", **SETTINGS)
    assert built.manifest.content_hash == local.manifest.content_hash
    assert verify_shards(built.manifest_url, processes=2) == []
    assert not storage.exists(f"{s3}/clips/parts")
    config = load_config("features", (*TINY, f"data.manifest={built.manifest_url}"))
    features = make_features(config, f"{s3}/features", batch=4, device=torch.device("cpu"))
    assert verify_shards(features.manifest_url) == []
    assert make_features(config, f"{s3}/features", batch=4, device=torch.device("cpu")).unchanged
    assert build_shards(source, f"{s3}/clips", **SETTINGS).unchanged


def test_large_shard_goes_up_in_parts(s3: str) -> None:
    data = bytes(range(256)) * 4096 * 60  # 60 MB: s3fs cuts from 50 MB on
    with storage.new_file(f"{s3}/large.tar") as file:
        file.write(data)
        assert not storage.exists(f"{s3}/large.tar")
    assert storage.sha256_file(f"{s3}/large.tar") == storage.sha256(data)
