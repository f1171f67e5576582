"""Streams from a real S3 server: exact, through outages and faults, each shard fetched once."""

import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from mlflow import MlflowClient

from avcil_dist import storage
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.shard_cache import LOCKS, OWN_FOLDER
from avcil_dist.errors import StorageError
from data_shards.random_features import make_feature_shards
from tests.helpers.commands import run_avcil
from tests.helpers.reading import clips_in_order, digest, digests, rows, total, training_batches
from tests.helpers.rendered import render_tiny
from tests.helpers.s3 import BUCKET, FaultyProxy, S3Server
from tests.helpers.streams import write_config
from tests.services.storage.conftest import use

PROJECT = Path(__file__).parents[3]
SMALL = {"visual": {"kind": "small", "dim": 8}, "audio": {"kind": "small", "dim": 8}}
CLIP = {"frames": 2, "size": 32, "mel_bins": 16, "mel_frames": 64}
WAYS = ["none", "cache"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 classes of 24 clips in 48 shards of about 30 kB."""
    folder = tmp_path_factory.mktemp("shards")
    make_feature_shards(folder, classes=8, clips={"train": 24, "val": 2}, clips_per_shard=4, positions=8, dim=128)
    return folder


@pytest.fixture
def stored(shards: Path, s3: str) -> str:
    """The url of their manifest in the server."""
    return store(shards, s3)


def store(folder: Path, url: str) -> str:
    """Copy shards and manifest to a url; the manifest there."""
    for path in folder.rglob("*.*"):
        storage.upload(path, f"{url}/{path.relative_to(folder)}")
    return f"{url}/manifest.json"


def cache(way: str, folder: Path) -> str:
    return "none" if way == "none" else str(folder / "cache")


def test_clips_are_built_to_s3_and_a_stream_is_trained_from_there(s3: str, tmp_path: Path) -> None:
    clips = render_tiny(tmp_path / "clips", classes=2, train=4, val=1, test=1)
    built = run_avcil("shards", "build", clips, f"{s3}/shards", "--clips-per-shard", 2)
    assert built.returncode == 0, built.stderr
    config = write_config(
        tmp_path,
        data={
            "manifest": f"{s3}/shards/manifest.json",
            "shard_cache": str(tmp_path / "cache"),
            "decode_workers": 1,
            "clip": CLIP,
        },
        scenario={"classes_per_step": [1, 1]},
        model=SMALL,
        optim={"epochs": 1, "global_batch": 4, "global_replay_batch": 2, "global_eval_batch": 2},
    )
    trained = run_avcil("train", config, "--processes", 2)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs/tiny-avcil-seed0/step_001/COMMITTED.json").exists()
    shards = load_manifest(f"{s3}/shards/manifest.json").shards
    kept = {path.stem for path in (tmp_path / "cache" / OWN_FOLDER).glob("*.tar")}
    assert kept == {shard.sha256 for shard in shards}
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    [first] = [run.data.metrics for run in runs if run.data.tags.get("avcil.step") == "0"]
    trained_on = [shard for shard in shards if shard.split == "train" and shard.class_name == shards[0].class_name]
    assert first["epoch_data/cache_misses"] == len(trained_on) == 2  # of both ranks together
    assert first["epoch_data/fetched_bytes"] == sum(shard.bytes for shard in trained_on)
    assert first["epoch_data/stall_seconds"] > 0
    assert "epoch_data/retries" not in first  # a counter that is always zero is not logged


def test_a_missing_shard_ends_the_command_with_one_line_and_exit_code_2(s3: str, tmp_path: Path) -> None:
    write_config(tmp_path)  # makes the shards
    url = store(tmp_path / "shards", s3)
    missing = load_manifest(url).url(0)
    storage.remove_tree(missing)
    result = run_avcil("train", write_config(tmp_path, data={"manifest": url}))
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("avcil: ")] == [
        f"avcil: {missing}: missing; restore the shards, or build them again"
    ]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("way", WAYS)
def test_batches_from_s3_equal_those_from_the_disk(stored: str, shards: Path, tmp_path: Path, way: str) -> None:
    found = digests(stored, epochs=2, shard_cache=cache(way, tmp_path))
    assert found == digests(f"{shards}/manifest.json", epochs=2)


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_dies_in_mid_epoch_and_comes_back_loses_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, s3_server: S3Server
) -> None:
    server = S3Server(tmp_path / "server")
    server.start()
    use(monkeypatch, server.endpoint)
    url = store(shards, f"s3://{BUCKET}/shards")
    batches = training_batches(url, epochs=1, shard_cache=cache(way, tmp_path), prefetch_shards=1, batch=4)
    seen = [next(batches) for _ in range(3)]
    server.kill()
    revival = threading.Timer(2.0, server.start)
    revival.start()
    seen += list(batches)
    revival.join()
    server.kill()
    assert total(seen)["retries"] > 0
    assert all(batch.valid.all() for batch in seen)
    assert [digest(batch) for batch in seen] == digests(f"{shards}/manifest.json", epochs=1, batch=4)


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_refuses_cuts_stalls_and_resets_loses_nothing(
    stored: str, shards: Path, tmp_path: Path, faulty: FaultyProxy, way: str
) -> None:
    seen = list(training_batches(stored, shard_cache=cache(way, tmp_path)))
    assert [digest(batch) for batch in seen] == digests(f"{shards}/manifest.json")
    assert min(faulty.injected[fault] for fault in faulty.faults) > 0
    injected = sum(faulty.injected.values())
    assert injected - faulty.injected["reset"] <= total(seen)["retries"] <= injected
    assert total(seen)["stall_seconds"] > 1  # of the stalls, each five seconds long


def test_a_storage_that_stays_away_stops_the_reading(
    stored: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(s3_server, every=1, faults=("refuse",))
    use(monkeypatch, proxy.endpoint)
    with pytest.raises(StorageError, match=r"tries in 1 s failed"):
        list(training_batches(stored, shard_cache="none", retry_seconds=1))
    proxy.close()


def test_four_processes_that_ask_for_one_shard_fetch_it_once(
    stored: str, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(s3_server, every=10**9, faults=())
    use(monkeypatch, proxy.endpoint)
    script = (
        "import json, sys; import torch; torch.set_num_threads(1); from tests.helpers.reading import *;"
        "sys.stdin.readline(); url, cache, rank = sys.argv[1:];"
        "print(json.dumps(total(list(training_batches(url, shard_cache=cache, ranks=4, rank=int(rank))))))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, stored, str(tmp_path / "cache"), str(rank)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for process in processes:  # all at once
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    counts: Counter[str] = Counter()
    for process in processes:
        counts.update(json.loads(process.communicate(timeout=120)[0]))
        assert process.returncode == 0
    num_shards = sum(shard.split == "train" for shard in load_manifest(stored).shards)
    proxy.close()
    assert counts["cache_misses"] == num_shards == 48
    assert counts["cache_hits"] >= 48
    assert set(proxy.paths.values()) == {1}


def test_a_cache_of_a_twentieth_reads_each_shard_about_once_an_epoch(s3: str, tmp_path: Path) -> None:
    make_feature_shards(tmp_path / "many", classes=20, clips={"train": 40}, clips_per_shard=4, positions=8, dim=64)
    url = store(tmp_path / "many", s3)
    manifest = load_manifest(url)
    stored_bytes = sum(shard.bytes for shard in manifest.shards)
    settings: dict[str, object] = {
        "shard_cache": str(tmp_path / "cache"),
        "shard_cache_gigabytes": 0.05 * stored_bytes / 1e9,
    }
    epochs = 3
    held: list[int] = []
    batches = []
    # a window of 3 needs at most 10 shards at a time, which fit; a window of 4 needs 12 twice
    for batch in training_batches(url, epochs=epochs, batch=8, shuffle_window=3, prefetch_shards=1, **settings):
        folder = tmp_path / "cache" / OWN_FOLDER
        with FileLock(folder / LOCKS / "room.lock"):  # nothing comes or goes while they are counted
            held.append(len(list(folder.glob("*.tar"))))
        batches.append(batch)
    counts = total(batches)
    reads = counts["cache_misses"] / epochs / len(manifest.shards)
    print(
        f"{len(manifest.shards)} shards, cache of 5 %: {counts['cache_misses']:.0f} fetched in {epochs} epochs, "
        f"{reads:.2f} an epoch and shard; no room {counts['cache_full']:.0f} times"
    )
    assert max(held) > 0
    assert max(held) * min(shard.bytes for shard in manifest.shards) <= 0.05 * stored_bytes
    assert reads <= 1.1
    assert counts["cache_full"] == 0
    visual, _, valid = rows(batches)
    assert valid.all()
    expected = rows(clips_in_order(f"{tmp_path}/many/manifest.json"))[0]
    in_one_epoch = visual[: len(expected)].flatten(1).float().sum(dim=1)
    wanted = expected.flatten(1).float().sum(dim=1)
    assert torch.equal(in_one_epoch.sort().values, wanted.sort().values)


def test_eight_machines_fetch_an_eighth_each_the_same_in_every_epoch(stored: str, shards: Path, tmp_path: Path) -> None:
    """Each machine has a cache of its own; 8 canonical nodes."""

    def machine(number: int) -> tuple[list[str], Counter[str], set[str]]:
        folder = str(tmp_path / f"cache{number}")
        settings: dict[str, object] = {
            "ranks": 8,
            "rank": number,
            "canonical_nodes": 8,
            "shard_cache": folder,
            "shuffle_window": 2,
        }
        batches = list(training_batches(stored, epochs=3, batch=16, **settings))
        kept = {path.stem for path in Path(folder, OWN_FOLDER).glob("*.tar")}
        return [digest(batch) for batch in batches], total(batches), kept

    with ThreadPoolExecutor(4) as threads:
        machines = list(threads.map(machine, range(8)))
    print("shards fetched by each machine in 3 epochs:", [counts["cache_misses"] for _, counts, _ in machines])
    for _, counts, kept in machines:
        assert abs(counts["cache_misses"] - 48 / 8) <= 1  # in all three epochs together
        assert len(kept) == counts["cache_misses"]
    assert len(set().union(*(kept for *_, kept in machines))) == 48


@pytest.fixture(autouse=True)
def _no_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shards never go to the user's own cache."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
