"""Shards built straight into a bucket, by parts and worker processes."""

from pathlib import Path

from avcil_dist import storage
from avcil_dist.data.manifest import load_manifest
from tests.helpers.commands import run_avcil
from tests.helpers.rendered import render_tiny
from tests.unit.test_feature_shards import TINY


def avcil_shards(*words: object) -> str:
    """Run a command of `avcil shards` that must succeed; what it prints."""
    done = run_avcil("shards", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parts_and_features_are_built_into_a_bucket(s3: str, tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    for part in ("1/2", "2/2"):
        avcil_shards("build", source, f"{s3}/clips", "--part", part, "--clips-per-shard", 2)
        assert not storage.exists(f"{s3}/clips/manifest.json")
    avcil_shards("merge", f"{s3}/clips")
    built = load_manifest(f"{s3}/clips/manifest.json")
    avcil_shards("build", source, tmp_path / "local", "--clips-per-shard", 2)
    assert built.content_hash == load_manifest(f"{tmp_path}/local/manifest.json").content_hash
    avcil_shards("verify", f"{s3}/clips/manifest.json")
    assert not storage.exists(f"{s3}/clips/parts")
    for _ in range(2):  # the second time nothing is left to do
        avcil_shards("features", f"{s3}/clips/manifest.json", f"{s3}/features", *TINY)
    avcil_shards("verify", f"{s3}/features/manifest.json")
    assert load_manifest(f"{s3}/features/manifest.json").shape == {"frames": 2, "positions": 4, "dim": 32}


def test_large_shard_goes_up_in_parts(s3: str) -> None:
    data = bytes(range(256)) * 4096 * 60  # 60 MB: s3fs cuts from 50 MB on
    with storage.new_file(f"{s3}/large.tar") as file:
        file.write(data)
        assert not storage.exists(f"{s3}/large.tar")
    assert storage.sha256_file(f"{s3}/large.tar") == storage.sha256(data)
