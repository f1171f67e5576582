"""Disks that are full or can only be read: one line that names the place and the remedy, and nothing half-written.

The limit on the size of a file stands for a full disk; a mount is one that can only be read.
"""

import errno
import hashlib
import resource
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avcil_dist import storage
from avcil_dist.config.schema import ClipConfig, DataConfig
from avcil_dist.data.decode_pool import DecodePool, EncodedClip
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.reader import Segment, ShardReader
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.data.shard_cache import ShardCache
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import AvcilError, ConfigError, StorageError, WorldError
from avcil_dist.storage.hub import cache_folder, hub_fault
from avcil_dist.tracking.faults import reported
from avcil_dist.training.exemplar_copies import _try_to_copy
from data_shards.clip_bytes import read_clip
from data_shards.listings.listing import ClipFile, FrameSeries
from data_shards.random_features import make_feature_shards
from launch.cluster.chain_record import mark_failed
from launch.cluster.submission_lock import submission_lock
from tests.helpers.disks import read_only, small_disk
from tests.helpers.pictures import series
from tests.helpers.reading import training_source
from tests.helpers.rendered import tiny_clip

FULL = OSError(errno.ENOSPC, "No space left on device")
CLIP = ClipConfig(frames=2, size=32, mel_bins=16, mel_frames=32)


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """A limit of this process, such as RLIMIT_FSIZE."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def one_line(error: pytest.ExceptionInfo[AvcilError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _new_file(url: str) -> None:
    with storage.new_file(url) as file:
        file.write(bytes(100_000))


def _locked(url: str) -> None:
    with storage.file_lock(Path(url), 1):
        pass


WRITES: dict[str, Callable[[str], object]] = {
    "bytes": lambda url: storage.write_bytes(url, bytes(100_000)),
    "json": lambda url: storage.write_json(url, ["x" * 100_000]),
    "a copy": lambda url: storage.upload(f"{Path(url).parents[1]}/source", url),
    "a new file": _new_file,
}


@pytest.mark.parametrize("write", [*WRITES.values()], ids=[*WRITES])
def test_full_disk_keeps_what_it_has(tmp_path: Path, write: Callable[[str], object]) -> None:
    (tmp_path / "source").write_bytes(bytes(100_000))
    with small_disk(tmp_path / "disk", kilobytes=64):
        (tmp_path / "disk/old").write_bytes(b"the old bytes")
        for name in ("old", "new"):
            with pytest.raises(StorageError, match=r"No space left on device\); make room") as raised:
                write(f"{tmp_path}/disk/{name}")
            assert one_line(raised).startswith(f"{tmp_path}/disk/{name}: cannot be written")
        assert _content(tmp_path / "disk") == {"old": b"the old bytes"}


@pytest.mark.parametrize("write", [*WRITES.values(), _locked, storage.remove_tree], ids=[*WRITES, "a lock", "removal"])
def test_folder_that_can_only_be_read_is_named(tmp_path: Path, write: Callable[[str], object]) -> None:
    (tmp_path / "source").write_bytes(bytes(100))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/x").write_bytes(b"the old bytes")
    with (
        read_only(tmp_path / "runs"),
        pytest.raises(StorageError, match=r"Read-only file system\); make room, or name another") as raised,
    ):
        write(f"{tmp_path}/runs/x")
    assert one_line(raised).startswith(f"{tmp_path}/runs/x: cannot be written")
    assert _content(tmp_path / "runs") == {"x": b"the old bytes"}


def _cache(folder: Path) -> ShardCache:
    executor = ThreadPoolExecutor(1)
    return ShardCache(
        folder,
        10_000,
        executor=executor,
        retry_seconds=1,
        count=lambda name, amount: None,
        on_retry=lambda: None,
    )


def test_shard_cache_that_can_only_be_read_gives_what_it_has_and_is_named(tmp_path: Path) -> None:
    root, contents = f"memory://{uuid.uuid4().hex}", [bytes([number]) * 1000 for number in range(2)]
    cache, places = _cache(tmp_path / "cache"), []
    for number, content in enumerate(contents):
        storage.write_bytes(f"{root}/{number}.tar", content)
        places.append((f"{root}/{number}.tar", 1000, hashlib.sha256(content).hexdigest()))
    assert cache.open(*places[0]) is not None
    with read_only(tmp_path / "cache"):
        assert cache.find(*places[0][1:]) is not None
        with pytest.raises(StorageError, match=r"^data\.shard_cache: .*cache: Read-only file system; check the disk"):
            cache.open(*places[1])
    (tmp_path / "locked").mkdir()
    with (
        read_only(tmp_path / "locked"),
        pytest.raises(ConfigError, match=r"^data\.shard_cache: .*x: Read-only file system; name a folder that can be"),
    ):
        _cache(tmp_path / "locked/x")


def test_exemplars_that_have_no_room_are_a_fault_for_all_ranks(tmp_path: Path, monkeypatch: Any) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path / "shards", classes=1, clips={"train": 4}))
    source, clips = training_source(manifest), np.arange(4)
    (tmp_path / "temporary").mkdir()
    for folder, limit in ((tmp_path / "temporary", 500), (tmp_path / "gone", 1 << 30)):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        with limited(resource.RLIMIT_FSIZE, limit):
            _, fault = _try_to_copy(source, clips)
        assert fault is not None
        assert fault.startswith(f"{folder}")
        assert "make room, or set TMPDIR to another folder" in fault


def test_decoding_process_that_gets_no_memory_is_one_line() -> None:
    pool = DecodePool(ClipTransform(CLIP), ((2, 3, 32, 32), (32, 16)), 1, {})
    clip = EncodedClip(0, "dog", memoryview(tiny_clip()), None)
    with limited(resource.RLIMIT_FSIZE, 100), pytest.raises(WorldError) as raised:
        pool.submit(clip, (np.zeros(1), np.zeros(1)))()  # type: ignore[arg-type]
    pool.close()
    assert one_line(raised).startswith("data.decode_workers: no process can be started ([Errno 27] File too large)")


def test_limit_of_open_files_is_no_damage_of_clips(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path / "shards", classes=1, clips={"train": 4}))
    with ShardReader(manifest, DataConfig(manifest="-")).open() as reader, limited(resource.RLIMIT_NOFILE, 3):
        (request,) = reader.ahead(FixedSampler(np.arange(4)[None]))
        with pytest.raises(StorageError, match=r"Too many open files; raise the limit \(ulimit -n\)"):
            reader.read(request, [Segment(0, 0, [memoryview(bytearray(1))], row=0)])


def test_pictures_are_not_rejected_where_the_temporary_folder_is_full(tmp_path: Path, monkeypatch: Any) -> None:
    folder = series(tmp_path / "ID", [f"{number:05d}.jpg" for number in range(16)])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    file = ClipFile(str(folder), None, frames=FrameSeries(8.0, f"{folder}.wav"))
    with limited(resource.RLIMIT_FSIZE, 1000), pytest.raises(StorageError, match="set TMPDIR to another folder"):
        read_clip(file)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("make", [storage.new_temporary_folder, lambda: storage.temporary_folder().__enter__()])
def test_missing_temporary_folder_is_one_line(tmp_path: Path, monkeypatch: Any, make: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"^TMPDIR: no temporary folder can be made \(No such file or directory\)"):
        make()


def test_full_disk_of_downloads_is_not_taken_for_a_fault_of_the_network() -> None:
    words = "make room, or set HF_HOME to another folder"
    assert str(hub_fault("a/b", "main", FULL)) == f"{cache_folder()}: cannot be written ({FULL.strerror}); {words}"
    with (
        pytest.raises(StorageError, match=r"No space left on device\); make room, or set TMPDIR"),
        reported("http://x"),
    ):
        raise FULL


def test_folder_of_jobs_that_takes_no_file_is_named(tmp_path: Path) -> None:
    stream = str(tmp_path / "runs/stream")
    with small_disk(tmp_path / "jobs", kilobytes=16):
        with (
            pytest.raises(StorageError, match=r"jobs/x: cannot be written \(No space left"),
            submission_lock(stream, tmp_path / "jobs/x"),
        ):
            (tmp_path / "jobs/x/script.sh").write_bytes(bytes(100_000))
        with (
            read_only(tmp_path / "jobs"),
            pytest.raises(StorageError, match=r"jobs/y: cannot be written \(Read-only file system"),
            submission_lock(stream, tmp_path / "jobs/y"),
        ):
            pass
    (tmp_path / "chain").mkdir()
    with read_only(tmp_path / "chain"), pytest.raises(StorageError, match=r"step_002\.failed: cannot be written"):
        mark_failed(f"{tmp_path}/chain", 2, "an error")
