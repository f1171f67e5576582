"""Storage against a real S3 server: faults by name, retries, forks, what others write."""

import hashlib
import multiprocessing
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pytest

from avcil_dist import storage
from avcil_dist.errors import DataError, StorageError
from avcil_dist.storage.retry import with_retries
from tests.helpers.ports import reserve_port
from tests.helpers.s3 import BUCKET, FaultyProxy, S3Server
from tests.helpers.streams import avcil, write_config
from tests.services.storage.conftest import use

READS = [storage.read_bytes, storage.size, storage.sha256_file, lambda url: storage.read_range(url, 0, 4)]


def test_what_is_written_is_read_and_removed(s3: str) -> None:
    url = f"{s3}/a/x.bin"
    assert not storage.exists(url)
    storage.write_bytes(url, b"first")
    storage.write_bytes(url, b"0123456789")
    assert storage.exists(url)
    assert storage.size(url) == 10
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_range(url, 3, 7) == b"3456"
    assert storage.sha256_file(url) == hashlib.sha256(b"0123456789").hexdigest()
    storage.remove_tree(s3)
    assert not storage.exists(url)


def test_a_large_file_goes_up_in_parts(s3: str, tmp_path: Path) -> None:
    source = tmp_path / "large.tar"
    part = bytes(range(256)) * 4096
    with source.open("wb") as file:
        for number in range(105):
            file.write(bytes([number]) + part)
    tracemalloc.start()
    storage.upload(source, f"{s3}/large.tar")
    assert tracemalloc.get_traced_memory()[1] < 90 * 2**20  # many processes upload at a time
    tracemalloc.stop()
    assert storage.size(f"{s3}/large.tar") == source.stat().st_size > 2 * 50 * 2**20
    assert storage.sha256_file(f"{s3}/large.tar") == storage.sha256_file(str(source))
    storage.remove_tree(s3)


def test_the_whole_object_replaces_the_old_one_or_none(s3: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3}/x.tar", b"old")
    with pytest.raises(DataError, match="gone: missing"):
        storage.upload(tmp_path / "gone", f"{s3}/x.tar")
    assert storage.read_bytes(f"{s3}/x.tar") == b"old"


@pytest.mark.parametrize("read", READS)
def test_a_missing_object_is_named(s3: str, read: Any) -> None:
    with pytest.raises(DataError) as caught:
        read(f"{s3}/gone.tar")
    assert str(caught.value) == f"{s3}/gone.tar: missing"


@pytest.mark.parametrize("read", READS)
def test_a_missing_bucket_is_named(s3: str, read: Any) -> None:
    with pytest.raises(StorageError) as caught:
        read("s3://nowhere/x.tar")
    assert str(caught.value) == "s3://nowhere/x.tar: there is no bucket s3://nowhere; create it, or correct the url"


def test_writing_to_a_missing_bucket_names_it(s3: str) -> None:
    with pytest.raises(StorageError, match="there is no bucket s3://nowhere"):
        storage.write_bytes("s3://nowhere/x.tar", b"x")


@pytest.mark.parametrize("wrong", [{"AWS_SECRET_ACCESS_KEY": "mistyped"}, {"AWS_ACCESS_KEY_ID": "nobody"}])
@pytest.mark.parametrize("read", [*READS, storage.exists, lambda url: storage.write_bytes(url, b"x")])
def test_wrong_credentials_are_refused_at_once_and_said(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], read: Any
) -> None:
    storage.write_bytes(f"{s3}/x.tar", b"data")
    use(monkeypatch, s3_server.endpoint, **wrong)
    with pytest.raises(StorageError, match=r"access refused .*check the credentials .*AWS_SECRET_ACCESS_KEY") as caught:
        read(f"{s3}/x.tar")
    assert "\n" not in str(caught.value)
    assert "mistyped" not in str(caught.value)


def test_no_credentials_are_said(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, s3_server.endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="no credentials; check the credentials in the environment: AWS_ACCESS_KEY"):
        storage.read_bytes(f"{s3}/x.tar")


def test_a_range_beyond_the_end_is_a_cut_shard(s3: str) -> None:
    storage.write_bytes(f"{s3}/x.tar", bytes(100))
    for start in (50, 100, 5000):
        with pytest.raises(DataError, match=rf"x\.tar: 100 bytes, {start + 60} are needed; the shard is cut"):
            storage.read_range(f"{s3}/x.tar", start, start + 60)


@pytest.mark.parametrize("fault", ["refuse", "cut", "stall", "reset"])
def test_a_fault_that_passes_is_tried_again_and_counted(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, impatient: None, fault: str
) -> None:
    data = bytes(range(256)) * 1000
    storage.write_bytes(f"{s3}/x.tar", data)
    proxy = FaultyProxy(s3_server, every=2, faults=(fault,))
    use(monkeypatch, proxy.endpoint)
    retries: list[int] = []
    for _ in range(2):
        assert storage.read_range(f"{s3}/x.tar", 100, 200_000, on_retry=lambda: retries.append(1)) == data[100:200_000]
        assert storage.read_bytes(f"{s3}/x.tar") == data
    proxy.close()
    assert proxy.injected[fault] >= 2
    if fault != "reset":  # of a connection that was used before, the http client tries once more itself
        assert len(retries) >= 1


def test_a_fault_that_lasts_is_said_at_the_deadline(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3}/x.tar", bytes(100))
    proxy = FaultyProxy(s3_server, every=1, faults=("refuse",))
    use(monkeypatch, proxy.endpoint)
    with pytest.raises(StorageError, match=r"tries in 4 s failed; check that the storage can be reached") as caught:
        storage.read_range(f"{s3}/x.tar", 0, 10, seconds=4)
    proxy.close()
    assert "\n" not in str(caught.value)
    assert proxy.injected["refuse"] > 1


def test_a_server_that_is_away_is_said_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    use(monkeypatch, f"http://127.0.0.1:{reserve_port()}")
    with pytest.raises(StorageError, match=r"Could not connect to the endpoint .* tries in 1 s failed"):
        storage.read_range(f"s3://{BUCKET}/x.tar", 0, 10, seconds=1)


def test_our_own_faults_are_not_tried_again() -> None:
    calls: list[int] = []

    def broken() -> None:
        calls.append(1)
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        with_retries(broken, "s3://x/y", seconds=5)
    assert len(calls) == 1


def _read_in_child(url: str, answers: Any) -> None:
    answers.put((storage.read_bytes(url), id(storage.open_filesystem(url)[0])))


def test_a_forked_process_makes_a_filesystem_of_its_own(s3: str) -> None:
    storage.write_bytes(f"{s3}/x.tar", b"data")
    filesystem = storage.open_filesystem(s3)[0]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(f"{s3}/x.tar", answers))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    data, other = answers.get()
    assert data == b"data"
    assert other != id(filesystem)
    assert storage.read_bytes(f"{s3}/x.tar") == b"data"  # the parent's still works


def test_threads_share_one_filesystem(s3: str) -> None:
    found: list[Any] = [storage.open_filesystem(s3)[0]]
    threads = [threading.Thread(target=lambda: found.append(storage.open_filesystem(s3)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(filesystem) for filesystem in found}) == 1


def test_what_another_writes_is_seen_at_once(s3: str) -> None:
    assert not storage.exists(f"{s3}/folder/x.json")
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(f"{s3}/folder/x.json", b"1")
    assert storage.exists(f"{s3}/folder/x.json")
    assert storage.exists(f"{s3}/folder")
    other.pipe_file(f"{s3}/folder/x.json", b"12345")
    assert storage.size(f"{s3}/folder/x.json") == 5


@pytest.mark.parametrize(
    ("manifest", "wrong", "said"),
    [
        ("FOLDER/gone/manifest.json", {}, "gone/manifest.json: missing"),
        ("s3://nowhere/manifest.json", {}, "there is no bucket s3://nowhere"),
        ("FOLDER/manifest.json", {"AWS_SECRET_ACCESS_KEY": "mistyped"}, "access refused"),
    ],
)
def test_the_command_ends_with_one_line_and_exit_code_2(
    s3: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    manifest: str,
    wrong: dict[str, str],
    said: str,
) -> None:
    use(monkeypatch, s3_server.endpoint, **wrong)
    result = avcil("train", write_config(tmp_path, data={"manifest": manifest.replace("FOLDER", s3)}))
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
