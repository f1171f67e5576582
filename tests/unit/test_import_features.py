import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset as wds
from click.testing import CliRunner

from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError
from data_shards.build_plan import BuildReport
from data_shards.importers import input_digests
from data_shards.importers.released_features import import_features
from data_shards.verify import verify_shards
from launch.cli.shards import shards
from tests.helpers.published_forms import save_pickled_dict, write_split_lists

FRAMES, POSITIONS, DIM = 2, 3, 4
KEYS = [f"video-{number}_{10 * number:06d}" for number in range(12)]


def _features() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    visual = {key: random.normal(size=(FRAMES * POSITIONS, DIM)).astype(np.float32) for key in KEYS}
    return visual, {key: random.normal(size=DIM).astype(np.float32) for key in KEYS}


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    labels = {
        "train": {key: "dog" if place % 2 else "cat" for place, key in enumerate(KEYS[:8])},
        "val": {KEYS[8]: "dog", KEYS[9]: "cat"},
        "test": {KEYS[10]: "dog", KEYS[11]: "cat"},
    }
    return write_split_lists(tmp_path / "lists", labels, {"dog": 0, "cat": 1})


def _write(folder: Path, kind: str, visual: dict[str, np.ndarray], audio: dict[str, np.ndarray]) -> tuple[Path, Path]:
    if kind == "npy":
        return save_pickled_dict(folder / "visual.npy", visual), save_pickled_dict(folder / "audio.npy", audio)
    with h5py.File(folder / "visual_features.h5", "w") as file:
        for key, values in visual.items():
            file.create_dataset(key, data=values)
    return folder / "visual_features.h5", save_pickled_dict(folder / "audio.npy", audio)


def _import(files: tuple[Path, Path], lists: Path, output: Path, **more: int) -> BuildReport:
    settings = {"frames": FRAMES, "clips_per_shard": 3} | more
    return import_features(*files, lists, str(output), **settings)


@pytest.mark.parametrize("kind", ["npy", "hdf5"])
def test_released_features_become_shards(tmp_path: Path, lists: Path, kind: str) -> None:
    visual, audio = _features()
    report = _import(_write(tmp_path, kind, visual, audio), lists, tmp_path / "out")
    manifest = report.manifest
    assert manifest.classes == ("dog", "cat")
    assert manifest.shape == {"frames": FRAMES, "positions": POSITIONS, "dim": DIM}
    assert [(shard.class_name, shard.split, shard.count) for shard in manifest.shards[:4]] == [
        ("dog", "train", 3),
        ("dog", "train", 1),
        ("dog", "val", 1),
        ("dog", "test", 1),
    ]
    assert report.rejected == ()
    assert verify_shards(report.manifest_url) == []
    urls = [manifest.url(number) for number in range(len(manifest.shards))]
    samples = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False).decode()}
    assert samples.keys() == set(KEYS)
    for key, sample in samples.items():
        np.testing.assert_array_equal(sample["visual.npy"], visual[key].astype(np.float16))
        np.testing.assert_array_equal(sample["audio.npy"], audio[key].astype(np.float16))
        assert sample["json"]["source"] == key.rpartition("_")[0]


def test_both_forms_give_the_same_shards(tmp_path: Path, lists: Path) -> None:
    visual, audio = _features()
    hashes = {
        _import(_write(tmp_path, kind, visual, audio), lists, tmp_path / kind).manifest.content_hash
        for kind in ("npy", "hdf5")
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["npy", "hdf5"])
def test_clips_without_good_features_are_rejected_by_name(tmp_path: Path, lists: Path, kind: str) -> None:
    visual, audio = _features()
    del visual[KEYS[1]], audio[KEYS[2]]
    visual[KEYS[3]] = visual[KEYS[3]][:-1]
    visual[KEYS[4]] = visual[KEYS[4]] * 1e6
    audio[KEYS[5]] = np.full(DIM, np.nan, np.float32)
    report = _import(_write(tmp_path, kind, visual, audio), lists, tmp_path / "out")
    reasons = {rejection.path: (rejection.kind, rejection.reason) for rejection in report.rejected}
    assert reasons[KEYS[1]] == ("missing", "no visual features")
    assert reasons[KEYS[2]] == ("missing", "no audio features")
    assert reasons[KEYS[3]][0] == "format"
    assert reasons[KEYS[4]] == ("corrupt", "visual.npy: has values that are no number, or too large for float16")
    assert reasons[KEYS[5]][1].startswith("audio.npy: has values")
    assert len(reasons) == 5
    assert sum(shard.count for shard in report.manifest.shards) == 7


def _with_times_of(first: Path, second: Path) -> None:
    """Give the second file the times of the first."""
    status = first.stat()
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["npy", "hdf5"])
def test_other_features_of_the_same_size_are_not_unchanged(tmp_path: Path, lists: Path, kind: str) -> None:
    visual, audio = _features()
    _import(_write(tmp_path, kind, visual, audio), lists, tmp_path / "out")
    (tmp_path / "other").mkdir()
    for name in ("visual", "audio"):
        changed = {"visual": dict(visual), "audio": dict(audio)}
        changed[name][KEYS[5]] = changed[name][KEYS[5]] + 1
        others = _write(tmp_path / "other", kind, changed["visual"], changed["audio"])
        with pytest.raises(ConfigError, match="made from other clips"):
            _import(others, lists, tmp_path / "out")
    again = _write(tmp_path / "other", kind, visual, audio)  # copies with other times
    assert _import(again, lists, tmp_path / "out").unchanged


def test_digests_are_reused_until_a_file_changes(tmp_path: Path, lists: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_digests, "SETTLED_NS", -1)
    files = _write(tmp_path, "npy", *_features())
    reads: list[int] = []

    def digests() -> list[str]:
        reads.clear()
        return input_digests.input_digests(files, f"{tmp_path}/out", lambda done, total: reads.append(done))

    first = digests()
    assert reads
    assert digests() == first
    assert not reads
    other = tmp_path / "other.npy"
    data = bytearray(files[1].read_bytes())
    data[-30] ^= 1
    other.write_bytes(data)
    _with_times_of(files[1], other)
    other.replace(files[1])  # same name, size and time of change
    assert digests()[0] == first[0]
    assert digests()[1] != first[1]


def test_digest_of_a_file_that_was_just_written_is_not_reused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"one")
    first = input_digests.input_digests([path], f"{tmp_path}/out")
    path.write_bytes(b"two")
    assert input_digests.input_digests([path], f"{tmp_path}/out") != first
    assert not (tmp_path / "out").exists()


class _KilledError(Exception):
    """Stands for a kill between two shards."""


def test_interrupted_import_that_continues_with_other_files_has_the_others_only(tmp_path: Path, lists: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done > 6:
            raise _KilledError

    visual, audio = _features()
    files = _write(tmp_path, "npy", visual, audio)
    with pytest.raises(_KilledError):
        import_features(*files, lists, f"{tmp_path}/out", frames=FRAMES, clips_per_shard=3, progress=kill)
    _write(tmp_path, "npy", {key: values + 1 for key, values in visual.items()}, audio)
    report = _import(files, lists, tmp_path / "out")
    urls = [report.manifest.url(number) for number in range(len(report.manifest.shards))]
    for sample in wds.WebDataset(urls, shardshuffle=False).decode():
        np.testing.assert_array_equal(sample["visual.npy"], (visual[sample["__key__"]] + 1).astype(np.float16))


def test_interrupted_import_does_not_repeat_finished_shards(tmp_path: Path, lists: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done > 6:
            raise _KilledError

    files = _write(tmp_path, "npy", *_features())
    with pytest.raises(_KilledError):
        import_features(*files, lists, f"{tmp_path}/out", frames=FRAMES, clips_per_shard=3, progress=kill)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    report = _import(files, lists, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert report.manifest.content_hash == _import(files, lists, tmp_path / "fresh").manifest.content_hash
    assert _import(files, lists, tmp_path / "out").unchanged


def test_the_second_of_two_imports_writes_nothing(
    tmp_path: Path, lists: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, second = _write(tmp_path, "npy", *_features()), list[Future[BuildReport]]()

    def start_another(done: int, total: int) -> None:
        while not caplog.records and not (second and second[0].done()):  # until it waits for the first
            second[:] = second or [pool.submit(_import, files, lists, tmp_path / "out")]
            wait(second, timeout=0.01)

    with ThreadPoolExecutor() as pool:
        import_features(*files, lists, f"{tmp_path}/out", frames=FRAMES, clips_per_shard=3, progress=start_another)
        assert second[0].result().unchanged


MEASURE = """
import resource, sys
from pathlib import Path
from data_shards.importers import input_digests
from data_shards.importers.released_features import import_features
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
visual, audio, lists, output = sys.argv[1:]
import_features(Path(visual), Path(audio), Path(lists), output, frames=8, clips_per_shard=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "hdf5"])
def test_features_are_never_in_memory_together(tmp_path: Path, lists: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    shape = (1568, 2304)  # 12 clips of 14 MB
    visual = {key: random.random(shape, dtype=np.float32) for key in KEYS}
    audio = {key: np.zeros(2304, np.float32) for key in KEYS}
    files = _write(tmp_path, kind, visual, audio)
    words = [sys.executable, "-c", MEASURE, *map(str, files), str(lists), f"{tmp_path}/out"]
    ran = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[2])
    total = sum(values.nbytes for values in visual.values())
    assert int(ran.stdout) * 1024 < total / 2


def test_features_of_another_benchmark_or_grid_are_refused(tmp_path: Path, lists: Path) -> None:
    visual, audio = _features()
    files = _write(tmp_path, "npy", visual, audio)
    with pytest.raises(ConfigError, match="6 tokens of 4 numbers are not 4 frames; give --frames"):
        _import(files, lists, tmp_path / "out", frames=4)
    others = _write(tmp_path, "npy", {f"x{key}": values for key, values in visual.items()}, audio)
    with pytest.raises(DataError, match="has no clip of the lists"):
        _import(others, lists, tmp_path / "out")
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match=r"broken\.h5: cannot be read as HDF5"):
        _import((tmp_path / "broken.h5", files[1]), lists, tmp_path / "out")
    with pytest.raises(DataError, match=r"gone\.npy: missing"):
        _import((tmp_path / "gone.npy", files[1]), lists, tmp_path / "out")


def test_command_imports_features(tmp_path: Path, lists: Path) -> None:
    visual, audio = _write(tmp_path, "hdf5", *_features())
    words = ["--visual", str(visual), "--audio", str(audio), "--splits", str(lists), "--frames", str(FRAMES)]
    result = CliRunner().invoke(shards, ["import-features", f"{tmp_path}/out", *words])
    assert result.exit_code == 0, result.output
    assert "12 clips, 2 classes, 6 shards" in result.output
    assert load_manifest(f"{tmp_path}/out/manifest.json").kind == "feature"


FAULTS = ("external", "external-link", "soft-link", "loop", "virtual", "huge", "text", "group")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dataset_outside_the_file_or_beyond_all_bounds_is_rejected(tmp_path: Path, lists: Path, fault: str) -> None:
    visual, audio = _features()
    victim, secret = KEYS[0], b"root:x:0:0:secret-of-this-machine"
    (tmp_path / "secret").write_bytes(secret * 20)
    files = _write(tmp_path, "hdf5", visual, audio)
    shape = visual[victim].shape
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_dataset("x", data=visual[victim])
    with h5py.File(files[0], "a") as file:
        del file[victim]
        if fault == "external":
            file.create_dataset(victim, shape, "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
        elif fault == "external-link":
            file[victim] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
        elif fault == "soft-link":
            file[victim] = h5py.SoftLink(f"/{KEYS[1]}")
        elif fault == "loop":
            file[victim] = h5py.SoftLink(f"/{victim}")
        elif fault == "virtual":
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape)
            file.create_virtual_dataset(victim, layout)
        elif fault == "huge":  # a few bytes on the disk
            file.create_dataset(victim, (1 << 20, 1 << 20), "f4", chunks=(1 << 10, 1 << 10), compression="gzip")
        elif fault == "text":
            file[victim] = "hello"
        else:
            file.create_group(victim)
    report = _import(files, lists, tmp_path / "out")
    assert [(rejection.path, rejection.kind) for rejection in report.rejected] == [(victim, "corrupt")]
    shards = list((tmp_path / "out").rglob("*.tar"))
    assert shards
    assert not any(b"secret-of-this-machine" in shard.read_bytes() for shard in shards)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(2000), b"text"])
def test_a_file_that_is_no_hdf5_is_one_line(tmp_path: Path, lists: Path, content: bytes) -> None:
    files = _write(tmp_path, "hdf5", *_features())
    files[0].write_bytes(content)
    with pytest.raises(DataError, match=r"visual_features\.h5: cannot be read as HDF5") as caught:
        _import(files, lists, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
