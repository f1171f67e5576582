import fcntl
import hashlib
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from avcil_dist import storage
from avcil_dist.data import shard_cache as cache_module
from avcil_dist.data.shard_cache import MARKER, ShardCache, cache_folder
from avcil_dist.errors import AvcilError, ConfigError, DataError, StorageError

PROJECT = Path(__file__).parents[2]
SIZE = 1000


class Shards:
    """Shards in memory storage, and a cache for `count` of them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.root = f"memory://{uuid.uuid4().hex}"
        self.counts: Counter[str] = Counter()
        self.executor = ThreadPoolExecutor(2)
        self.cache = ShardCache(
            folder / "cache",
            count * SIZE,
            executor=self.executor,
            retry_seconds=1,
            count=lambda name, amount: self.counts.update({name: amount}),
            on_retry=lambda: self.counts.update(retries=1),
        )

    def content(self, number: int) -> bytes:
        return bytes([number]) * SIZE

    def digest(self, number: int) -> str:
        return hashlib.sha256(self.content(number)).hexdigest()

    def open(self, number: int) -> int | None:
        url = f"{self.root}/{number}.tar"
        if not storage.exists(url):
            storage.write_bytes(url, self.content(number))
        return self.cache.open(url, SIZE, self.digest(number))

    def use(self, number: int) -> None:
        descriptor = self.open(number)
        assert descriptor is not None
        assert os.pread(descriptor, SIZE, 0) == self.content(number)
        os.close(descriptor)

    def kept(self) -> set[int]:
        names = {path.name for path in self.cache.folder.iterdir() if path.is_file()}
        return {number for number in range(20) if f"{self.digest(number)}.tar" in names}

    def leftovers(self) -> list[str]:
        return [path.name for path in self.cache.folder.glob(".*") if path.name != MARKER]


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Shards]:
    made = Shards(tmp_path, 3)
    yield made
    made.executor.shutdown()
    storage.remove_tree(made.root)


def test_a_shard_is_fetched_once(shards: Shards) -> None:
    for _ in range(3):
        shards.use(1)
    assert shards.counts == {"cache_misses": 1, "cache_hits": 2, "fetched_bytes": SIZE}


def test_the_least_recently_used_shard_makes_room(shards: Shards) -> None:
    for number in (1, 2, 3, 1, 4):
        shards.use(number)
    assert shards.kept() == {1, 3, 4}


def test_a_shard_in_use_is_never_removed_even_the_oldest(shards: Shards) -> None:
    held = shards.open(1)
    assert held is not None
    for number in (2, 3, 4, 5, 6):
        shards.use(number)
    assert 1 in shards.kept()
    os.close(held)
    for number in (2, 3, 4):
        shards.use(number)
    assert 1 not in shards.kept()


@pytest.mark.slow
def test_a_shard_that_another_process_uses_is_not_removed(shards: Shards) -> None:
    shards.use(1)
    script = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path;"
        "from avcil_dist.data.shard_cache import ShardCache;"
        "cache = ShardCache(Path(sys.argv[1]), 9999, executor=ThreadPoolExecutor(1), retry_seconds=1,"
        " count=print, on_retry=print);"
        "assert cache.find(1000, sys.argv[2]) is not None; print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", script, str(shards.cache.folder), shards.digest(1)]
    with subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for number in (2, 3, 4, 5):
            shards.use(number)
        assert 1 in shards.kept()
        other.kill()  # its end releases its lock
        other.wait()
    for number in (2, 3, 4):
        shards.use(number)
    assert 1 not in shards.kept()


def test_without_room_open_returns_none(shards: Shards) -> None:
    held = [shards.open(number) for number in (1, 2, 3)]
    assert shards.open(4) is None
    assert shards.counts["cache_full"] == 1
    assert shards.kept() == {1, 2, 3}
    for descriptor in held:
        assert descriptor is not None
        os.close(descriptor)
    shards.use(4)


def test_a_shard_that_cannot_fit_removes_no_other(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    held = shards.open(1)
    assert held is not None
    for number in (2, 3):
        shards.use(number)
    left = shards.cache.folder / f".{'0' * 64}.{'f' * 32}"
    left.write_bytes(bytes(SIZE))
    for size in (2 * SIZE + 1, 4 * SIZE):  # more than the unused ones, and than the cache
        assert shards.cache.open(f"{shards.root}/4.tar", size, shards.digest(4)) is None
        assert shards.kept() == {1, 2, 3}
    assert not left.exists()
    monkeypatch.setattr(cache_module, "DISK_RESERVE", 1.0)
    assert shards.open(4) is None
    assert shards.kept() == {1, 2, 3}
    os.close(held)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow, as far as this process can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_open_returns_none_and_no_file_is_left(shards: Shards) -> None:
    with full_disk():
        assert shards.open(1) is None
    assert shards.leftovers() == []
    shards.use(1)


def test_a_part_of_the_disk_stays_free(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "DISK_RESERVE", 1.0)
    assert shards.open(1) is None


def test_a_shard_that_is_not_the_manifests_is_refused_and_not_kept(shards: Shards) -> None:
    url = f"{shards.root}/1.tar"
    storage.write_bytes(url, b"x" * SIZE)
    with pytest.raises(DataError, match=rf"^{url}: its sha256 is not the manifest's") as caught:
        shards.open(1)
    assert "\n" not in str(caught.value)
    assert shards.kept() == set()
    assert shards.leftovers() == []


@pytest.mark.parametrize("content", [None, b"x" * (SIZE - 1)])
def test_a_shard_that_is_missing_or_short_is_named(shards: Shards, content: bytes | None) -> None:
    url = f"{shards.root}/1.tar"
    if content is not None:
        storage.write_bytes(url, content)
    with pytest.raises(DataError, match=rf"^{url}: "):
        shards.cache.open(url, SIZE, shards.digest(1))
    assert shards.leftovers() == []


def test_what_a_killed_process_left_makes_room(shards: Shards) -> None:
    left = shards.cache.folder / f".{'0' * 64}.{'f' * 32}"
    left.write_bytes(bytes(3 * SIZE))
    shards.use(1)
    assert not left.exists()


def test_what_a_killed_process_left_is_removed_before_any_shard(shards: Shards) -> None:
    for number in (1, 2):
        shards.use(number)
    left = shards.cache.folder / f".{'0' * 64}.{'f' * 32}"
    left.write_bytes(bytes(SIZE))  # newer than both shards
    shards.use(3)
    assert not left.exists()
    assert shards.kept() == {1, 2, 3}


def test_only_the_user_can_read_the_cache(shards: Shards) -> None:
    shards.use(1)
    [file] = shards.cache.folder.glob("*.tar")
    assert stat.S_IMODE(shards.cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"^data\.shard_cache: .*cache: belongs to another user"):
        Shards(tmp_path, 1)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(ConfigError, match=r"^data\.shard_cache: .*cache: others can write it"):
        Shards(tmp_path, 1)


def test_the_files_of_the_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (".bashrc", ".netrc", "data.tar", f".{'0' * 64}.{'f' * 32}", f"{'0' * 64}.tar")
    for name in names:
        (tmp_path / name).write_bytes(bytes(SIZE))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = Shards(cache_folder(str(tmp_path)), 1)
    for number in range(4):
        made.use(number)
    assert all((tmp_path / name).stat().st_size == SIZE for name in names)
    assert cache_folder(str(tmp_path)) == tmp_path / "avcil-shards"
    assert cache_folder("auto") == tmp_path / f"avcil-shards-{os.getuid()}"
    made.executor.shutdown()


def test_a_folder_with_other_files_and_no_marker_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "thesis.tex").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"^data\.shard_cache: .*cache: holds 'thesis\.tex', so it is no folder"):
        Shards(tmp_path, 1)


def test_other_files_beside_the_marker_are_neither_counted_nor_removed(shards: Shards) -> None:
    folder = shards.cache.folder
    for name in (".bashrc", "notes", "x.tar", f"{'A' * 64}.tar"):
        (folder / name).write_bytes(bytes(5 * SIZE))
    (folder / f"{'1' * 64}.tar").symlink_to(folder / "notes")
    for number in range(5):
        shards.use(number)
    assert shards.kept() == {2, 3, 4}
    assert {".bashrc", "notes", "x.tar", f"{'A' * 64}.tar"} <= {path.name for path in folder.iterdir()}


def test_a_link_in_the_place_of_the_folder_or_of_a_shard_is_not_followed(shards: Shards, tmp_path: Path) -> None:
    victim = tmp_path / "secret"
    victim.write_bytes(bytes(SIZE))
    planted = shards.cache.folder / f"{shards.digest(1)}.tar"
    planted.symlink_to(victim)
    assert shards.cache.find(SIZE, shards.digest(1)) is None
    shards.use(1)
    assert not planted.is_symlink()
    assert victim.read_bytes() == bytes(SIZE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cache").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not a folder, or a link to one"):
        Shards(tmp_path / "other", 1)


def test_a_pipe_in_the_place_of_a_shard_does_not_block(shards: Shards) -> None:
    os.mkfifo(shards.cache.folder / f"{shards.digest(1)}.tar")
    shards.use(1)


@pytest.mark.parametrize("digest", ["", "../victim/secret", "/w_evil", "0" * 63, "G" * 64, "A" * 64, "0" * 64 + "\n"])
def test_what_is_no_digest_is_refused_and_makes_no_file(shards: Shards, tmp_path: Path, digest: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    for use in (lambda: shards.cache.open("memory://x", SIZE, digest), lambda: shards.cache.find(SIZE, digest)):
        with pytest.raises(DataError, match="not 64 hex digits"):
            use()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_on_object_storage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.shard_cache: memory://x: not on a local disk"):
        cache_folder("memory://x")


def test_a_folder_that_is_removed_meanwhile_is_made_again(shards: Shards) -> None:
    shards.use(1)
    shutil.rmtree(shards.cache.folder)
    shards.use(2)
    assert stat.S_IMODE(shards.cache.folder.stat().st_mode) == 0o700
    assert shards.kept() == {2}


def test_a_folder_that_is_lost_meanwhile_is_one_line(shards: Shards) -> None:
    shutil.rmtree(shards.cache.folder)
    shards.cache.folder.symlink_to("gone")
    with pytest.raises(AvcilError, match=r"cache: not a folder"):
        shards.open(2)
    shards.cache.folder.unlink()
    shards.cache.folder.parent.rmdir()
    shards.cache.folder.parent.write_bytes(b"")
    with pytest.raises(StorageError, match=r"^data\.shard_cache: .*cache: .*; check the disk, or name another folder"):
        shards.open(2)


def test_a_shard_is_locked_while_it_is_fetched_and_shared_afterwards(shards: Shards, monkeypatch: Any) -> None:
    locks: list[int] = []
    flock = fcntl.flock

    def recorded(file: int, kind: int) -> None:
        if kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):  # the others are of locks for adding and removing files
            locks.append(kind)
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", recorded)
    shards.use(1)
    assert locks == [fcntl.LOCK_EX, fcntl.LOCK_SH]
    shards.use(1)
    assert locks == [fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_SH]


def test_a_kept_file_of_another_length_is_not_taken(shards: Shards) -> None:
    shards.use(1)
    path = shards.cache.folder / f"{shards.digest(1)}.tar"
    path.write_bytes(b"short")
    shards.use(1)
    assert shards.counts["cache_misses"] == 2


def test_a_folder_that_cannot_be_made_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^data\.shard_cache: .*file/cache: .*; name a folder that can be written"):
        Shards(tmp_path / "file", 1)
