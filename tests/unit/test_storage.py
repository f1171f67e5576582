import hashlib
import json
import os
import resource
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import Timeout
from pydantic import JsonValue

from avcil_dist import storage
from avcil_dist.errors import ConfigError, DataError, StorageError


@pytest.fixture(params=["plain", "file://", "memory://"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on each kind of filesystem that needs no server."""
    if request.param == "memory://":
        url = f"memory:/{tmp_path}"
        yield url
        storage.remove_tree(url)
    else:
        yield str(tmp_path) if request.param == "plain" else f"file://{tmp_path}"


@contextmanager
def files_no_longer_than(num_bytes: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell: longer writes fail midway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_is_read(root: str) -> None:
    url = storage.join(root, "a/b", "file.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"first")
    storage.write_bytes(url, b"other!")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"other!"
    assert storage.size(url) == 6


def read_settings(url: str) -> dict[str, JsonValue]:
    return storage.read_json(url, dict[str, JsonValue], "settings")


def test_json_comes_back_and_equal_values_give_equal_bytes(root: str) -> None:
    first, second = storage.join(root, "1.json"), storage.join(root, "2.json")
    storage.write_json(first, {"b": [1, None], "a": "é"})
    storage.write_json(second, {"a": "é", "b": [1, None]})
    assert storage.read_json(first, dict[str, JsonValue], "settings") == {"a": "é", "b": [1, None]}
    assert storage.read_bytes(first) == storage.read_bytes(second)


def test_a_missing_file_is_named(root: str) -> None:
    url = storage.join(root, "gone.json")
    for read in (storage.read_bytes, storage.size, read_settings, storage.sha256_file):
        with pytest.raises(DataError) as caught:
            read(url)
        assert str(caught.value) == f"{url}: missing"


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    for read in (storage.read_bytes, read_settings, storage.sha256_file):
        with pytest.raises(DataError, match=f"^{tmp_path}: a folder, not a file"):
            read(str(tmp_path))


def test_a_file_in_the_place_of_a_folder_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"manifest\.json: missing"):
        storage.read_bytes(f"{tmp_path}/file/manifest.json")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: not valid JSON \(") as caught:
        read_settings(f"{tmp_path}/x.json")
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_midway_leaves_the_old_file_alone(tmp_path: Path) -> None:
    url = f"{tmp_path}/model.bin"
    storage.write_bytes(url, b"old")
    with files_no_longer_than(1000), pytest.raises(StorageError, match=r"too large.*make room"):
        storage.write_bytes(url, bytes(5000))
    assert storage.read_bytes(url) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_a_first_write_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    with files_no_longer_than(1000), pytest.raises(StorageError, match=r"too large.*make room"):
        storage.write_bytes(f"{tmp_path}/model.bin", bytes(5000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["pipe:cat x", "pipe:curl http://host/x.tar"])
def test_pipe_urls_are_refused_and_run_nothing(tmp_path: Path, url: str) -> None:
    for use in (storage.open_filesystem, storage.read_bytes, storage.exists, storage.size):
        with pytest.raises(ConfigError, match="pipe urls run shell commands"):
            use(url)
    marker = tmp_path / "ran"
    with pytest.raises(DataError, match="not a plain path"):
        storage.read_bytes(storage.join(str(tmp_path), f"pipe:touch {marker}"))
    assert not marker.exists()


def test_an_unknown_protocol_is_one_line_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^nosuch://bucket/x: the protocol nosuch is not allowed") as caught:
        storage.read_bytes("nosuch://bucket/x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("runs", "a", "b.tar"), "runs/a/b.tar"),
        (("runs/", "a"), "runs/a"),
        (("s3://bucket/data", "train/c.tar"), "s3://bucket/data/train/c.tar"),
        (("runs",), "runs"),
    ],
)
def test_join(parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(*parts) == joined


@pytest.mark.parametrize(("url", "folder"), [("a/b/c.json", "a/b"), ("s3://x/c.json", "s3://x"), ("c.json", ".")])
def test_parent(url: str, folder: str) -> None:
    assert storage.parent(url) == folder


def test_a_removed_tree_is_gone_and_may_be_removed_again(root: str) -> None:
    folder = storage.join(root, "step_000")
    storage.write_bytes(storage.join(folder, "deep/x"), b"x")
    storage.remove_tree(folder)
    assert not storage.exists(storage.join(folder, "deep/x"))
    storage.remove_tree(folder)


def test_a_local_copy_is_that_of_one_file_and_lasts_as_long_as_its_block(root: str) -> None:
    for name in ("x.txt", "y.txt"):
        storage.write_bytes(storage.join(root, "folder", name), name.encode())
    with storage.local_copy(storage.join(root, "folder", "x.txt")) as path:
        assert (path.name, path.read_text()) == ("x.txt", "x.txt")
        assert len(list(path.parent.iterdir())) == (1 if root.startswith("memory") else 2)
    assert path.exists() == (not root.startswith("memory"))
    with pytest.raises(DataError, match=r"gone\.txt: missing"), storage.local_copy(storage.join(root, "gone.txt")):
        pass


def test_digests_of_bytes_and_of_a_file_longer_than_a_chunk(root: str) -> None:
    data = bytes(range(256)) * (storage.CHUNK_BYTES // 256) + b"end"
    storage.write_bytes(storage.join(root, "long.bin"), data)
    expected = hashlib.sha256(data).hexdigest()
    assert storage.sha256(data) == expected
    assert storage.sha256_file(storage.join(root, "long.bin")) == expected


def test_written_json_is_plain_json(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/x.json", {"a": [1]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1]}


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_new_file_appears_when_it_is_whole(tmp_path: Path, protocol: str) -> None:
    root = f"memory://{uuid.uuid4().hex}" if protocol == "memory" else f"file://{tmp_path}"
    url = storage.join(root, "deep/large.tar")
    with storage.new_file(url) as file:
        file.write(b"first ")
        file.flush()
        assert not storage.exists(url)
        file.write(b"second")
    assert storage.read_bytes(url) == b"first second"


def _write_half(url: str) -> None:
    with storage.new_file(url) as file:
        file.write(b"half")
        raise KeyboardInterrupt


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of syncs to disk and renames."""
    made: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        made.append(f"fsync {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        made.append(f"rename {path.stat().st_size}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return made


def test_the_whole_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, calls: list[str]) -> None:
    storage.write_bytes(f"{tmp_path}/a.bin", bytes(50))  # less than a buffer, which must be flushed first
    assert calls == ["fsync 50", "rename 50"]
    calls.clear()
    storage.upload(tmp_path / "a.bin", f"{tmp_path}/b.bin")
    assert calls == ["fsync 50", "rename 50"]
    calls.clear()
    with storage.new_file(f"{tmp_path}/c.bin") as file:
        file.write(bytes(70))
        assert calls == []
    assert calls == ["fsync 70", "rename 70"]


def test_a_range_is_read_exactly_or_refused(root: str) -> None:
    url = storage.join(root, "x.bin")
    storage.write_bytes(url, bytes(range(100)))
    assert storage.read_range(url, 10, 20) == bytes(range(10, 20))
    assert storage.read_range(url, 90, 100) == bytes(range(90, 100))
    for start, stop in ((95, 101), (100, 110), (200, 210)):
        with pytest.raises(DataError, match=rf"^{url}: 100 bytes, {stop} are needed; the shard is cut"):
            storage.read_range(url, start, stop)


def test_a_folder_is_listed_by_sorted_names_and_a_missing_one_is_empty(root: str) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        storage.write_bytes(storage.join(root, "folder", name), b"x")
    assert storage.list_folder(storage.join(root, "folder")) == ["a.txt", "b.txt", "deep"]
    assert storage.list_folder(storage.join(root, "gone")) == []


def test_new_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    url = f"{tmp_path}/large.tar"
    storage.write_bytes(url, b"old")
    with pytest.raises(KeyboardInterrupt):
        _write_half(url)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"large.tar": b"old"}


def test_a_pipe_and_a_device_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (f"{tmp_path}/pipe", "/dev/zero", "/dev/null"):
        for read in (storage.read_bytes, storage.size, read_settings, storage.sha256_file):
            with pytest.raises(DataError, match=f"^{path}: not a regular file"):
                read(path)
        with pytest.raises(DataError, match="not a regular file"):
            storage.read_range(path, 0, 10)
        with pytest.raises(DataError, match="not a regular file"), storage.open_file(path):
            pass


def test_a_write_replaces_nothing_but_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/full")
    before = sorted(tmp_path.iterdir())
    for name, reason in (("pipe", "a pipe"), ("device", "a device"), ("folder", "a folder")):
        with pytest.raises(StorageError, match=rf"{name}: cannot be written, it is.*{reason}"):
            storage.write_bytes(f"{tmp_path}/{name}", b"x")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("output", ["file/x", "file/deep/x", "/dev/null/x", "x" * 300])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    url = output if output.startswith("/") else f"{tmp_path}/{output}"
    with pytest.raises(StorageError, match=f"^{url}: cannot be written") as caught:
        storage.write_bytes(url, b"x")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match=f"^{url}: cannot be written"), storage.new_file(url) as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_folder_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        files_no_longer_than(1000),
        pytest.raises(StorageError, match="set TMPDIR to another folder"),
        storage.new_file(f"memory://{uuid.uuid4().hex}/x") as file,
    ):
        file.write(bytes(100_000))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}/gone")
    with pytest.raises(StorageError, match="TMPDIR"), storage.new_file(f"memory://{uuid.uuid4().hex}/x"):
        pass


def test_a_home_folder_is_no_place_for_a_plain_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    storage.write_bytes("~/x", b"x")  # a setting is expanded where it is read, nowhere else
    assert (tmp_path / "~" / "x").read_bytes() == b"x"
    assert not (tmp_path / "home").exists()


def test_odd_names_in_a_folder_are_not_listed(tmp_path: Path) -> None:
    for name in ("a", "b\nc", "pipe:x"):
        (tmp_path / name).write_bytes(b"")
    assert storage.list_folder(str(tmp_path)) == ["a"]


def test_a_lock_is_held_for_the_block_and_its_faults_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ".lock"
    with storage.file_lock(path, 1), pytest.raises(Timeout), storage.file_lock(path, 0.01):
        pass
    with storage.file_lock(path, 0.01):
        pass
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StorageError, match=r"file/x/\.lock: cannot be written"),
        storage.file_lock(tmp_path / "file" / "x" / ".lock", 1),
    ):
        pass
