"""Shards built straight into a bucket, by parts and worker processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from avcil_dist import storage
from avcil_dist.data.manifest import load_manifest
from data_shards.build import build_listing
from data_shards.build_plan import WHOLE
from data_shards.listings.mixed_tars import SampleRules
from data_shards.repack import list_for_repack
from data_shards.verify import verify_shards
from tests.helpers.commands import PROJECT, run_avcil
from tests.helpers.rendered import render_tiny
from tests.unit.test_feature_shards import TINY
from tests.unit.test_repack import KILLED, SETTINGS, mixed_tars


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


def test_killed_repack_of_a_bucket_continues_without_reading_a_tar_again(s3: str, tmp_path: Path) -> None:
    for path in mixed_tars(tmp_path / "tars"):
        storage.upload(path, f"{s3}/others/{Path(path).name}")
    urls = [f"{s3}/others/{{00000..00002}}.tar"]
    words = [sys.executable, "-c", KILLED, f"{s3}/out", *urls]
    killed = subprocess.run(words, check=False, cwd=PROJECT, env=os.environ | {"PYTHONPATH": str(PROJECT)})
    assert killed.returncode == -signal.SIGKILL
    done = {url: storage.version(url) for url in storage.find(f"{s3}/out/*/c*.tar")}
    assert 0 < len(done) < 8
    indexes = {url: storage.version(url) for url in storage.find(f"{s3}/out/parts/indexes/*")}
    assert len(indexes) == 3
    listing = list_for_repack(urls, f"{s3}/out", WHOLE, rules=SampleRules(), split=None)
    assert {url: storage.version(url) for url in indexes} == indexes
    repacked = build_listing(listing, f"{s3}/out", SETTINGS)
    assert repacked.rejected == ()
    assert {url: storage.version(url) for url in done} == done
    assert verify_shards(f"{s3}/out/manifest.json") == []
    assert not storage.exists(f"{s3}/out/parts")
    local = list_for_repack([f"{tmp_path}/tars/*.tar"], f"{tmp_path}/out", WHOLE, rules=SampleRules(), split=None)
    expected = build_listing(local, f"{tmp_path}/out", SETTINGS).manifest
    assert load_manifest(f"{s3}/out/manifest.json").content_hash == expected.content_hash


def test_large_shard_goes_up_in_parts(s3: str) -> None:
    data = bytes(range(256)) * 4096 * 60  # 60 MB: cut into parts of 8 MiB
    with storage.new_file(f"{s3}/large.tar") as file:
        file.write(data)
        assert not storage.exists(f"{s3}/large.tar")
    assert storage.sha256_file(f"{s3}/large.tar") == storage.sha256(data)
