import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import webdataset as wds

from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError
from data_shards.build import BuildReport, build_shards
from tests.helpers.commands import has_ended
from tests.helpers.rendered import remuxed, render_tiny, tiny_clip

torch.set_num_threads(1)


def _build(source: Path, output: Path, **settings) -> BuildReport:
    return build_shards(source, str(output), **({"clips_per_shard": 2, "min_seconds": 0.5} | settings))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _rejected(output: Path) -> dict[str, str]:
    with (output / "rejected.csv").open() as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


def _csv(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    path = folder / "list.csv"
    path.write_text("path,label,split\n" + "".join(",".join(row) + "\n" for row in rows))
    return path


def test_shards_hold_every_clip_of_the_csv(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    report = _build(source, tmp_path / "out")
    manifest = load_manifest(f"{tmp_path}/out/manifest.json")
    assert manifest.content_hash == report.manifest.content_hash
    assert manifest.kind == "clip"
    assert manifest.classes == ("class_000", "class_001")
    assert [(s.class_name, s.split, s.count) for s in manifest.shards[:4]] == [
        ("class_000", "train", 2),
        ("class_000", "train", 1),
        ("class_000", "val", 1),
        ("class_000", "test", 1),
    ]
    sample = next(iter(wds.WebDataset(manifest.url(0), shardshuffle=False).decode()))
    assert sample["mp4"] == (tmp_path / "clips/train/class_000/train-000-00000.mp4").read_bytes()
    assert sample["json"]["label"] == "class_000"
    assert sample["json"]["split"] == "train"
    assert sample["json"]["source"] == "train-000-00000"
    assert sample["json"]["duration"] == pytest.approx(1.0, abs=0.1)
    names = {re.sub("^clips-[0-9a-f]{16}", "clips", path.name) for path in (tmp_path / "out").iterdir()}
    assert names == {"build.json", "clips.npz", "manifest.json", "rejected.csv", "test", "train", "val"}


@pytest.mark.slow
def test_two_processes_build_the_same_bytes(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    seen: list[tuple[int, int]] = []
    _build(source, tmp_path / "one")
    _build(source, tmp_path / "two", processes=2, progress=lambda done, total: seen.append((done, total)))
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert seen[-1] == (10, 10)


def test_classes_keep_the_order_of_the_csv(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(tiny_clip())
    source = _csv(tmp_path, [("c.mp4", "zebra", "train"), ("a.mp4", "ant", "train"), ("b.mp4", "zebra", "test")])
    assert _build(source, tmp_path / "out").manifest.classes == ("zebra", "ant")


def test_folder_with_splits_is_read(tmp_path: Path) -> None:
    render_tiny(tmp_path / "clips")
    by_folder = _build(tmp_path / "clips", tmp_path / "one").manifest
    with (tmp_path / "clips/clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "clips/plain.csv").open("w") as file:  # without regions, which folders do not have
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "region"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    by_csv = _build(tmp_path / "clips/plain.csv", tmp_path / "two").manifest
    assert by_folder.content_hash == by_csv.content_hash


def test_folder_without_splits_is_split_within_the_class(tmp_path: Path) -> None:
    data = tiny_clip()
    for i in range(40):
        (tmp_path / "clips/dog").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"clips/dog/v_{i}.mp4").write_bytes(data)
    manifest = _build(tmp_path / "clips", tmp_path / "out", clips_per_shard=100).manifest
    counts = {shard.split: shard.count for shard in manifest.shards}
    assert sum(counts.values()) == 40
    assert counts["train"] > 20
    assert counts.keys() == {"train", "val", "test"}
    again = _build(tmp_path / "clips", tmp_path / "again", clips_per_shard=100).manifest
    assert again.content_hash == manifest.content_hash


def _faulty_source(folder: Path) -> Path:
    """One good clip, and one of each fault."""
    good = tiny_clip()
    folder.mkdir()
    clips = {
        "good.mp4": good,
        "silent.mp4": remuxed(good, sound=False),
        "cut.mp4": good[: len(good) // 2],
        "text.mp4": b"no video at all\n" * 100,
        "empty.mp4": b"",
        "other.mkv": remuxed(good, container="matroska"),
        "renamed.mp4": remuxed(good, container="matroska"),
    }
    for name, data in clips.items():
        (folder / name).write_bytes(data)
    rows = [(name, "dog", "train") for name in [*clips, "missing.mp4", "good.mp4"]]
    return _csv(folder, rows)


def test_each_fault_is_rejected_with_its_reason(tmp_path: Path) -> None:
    report = _build(_faulty_source(tmp_path / "clips"), tmp_path / "out")
    reasons = _rejected(tmp_path / "out")
    assert [shard.keys for shard in report.manifest.shards] == [("good",)]
    assert Counter(rejection.label for rejection in report.rejected) == {"dog": 8}
    assert reasons.keys() == {
        "silent.mp4", "cut.mp4", "text.mp4", "empty.mp4", "other.mkv", "renamed.mp4", "missing.mp4", "good.mp4",
    }  # fmt: skip
    for name, words in {
        "silent.mp4": "no audio track",
        "cut.mp4": "cut before its index",
        "text.mp4": "not a video",
        "empty.mp4": "empty",
        "other.mkv": "not an mp4",
        "renamed.mp4": "not an mp4",
        "missing.mp4": "missing file",
        "good.mp4": "duplicate key",
    }.items():
        assert words in reasons[name]


def test_short_clip_is_rejected(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    with pytest.raises(DataError, match="shorter than 5 s"):
        _build(source, tmp_path / "out", min_seconds=5.0)


def test_names_become_safe_keys_that_keep_the_source_apart(tmp_path: Path) -> None:
    (tmp_path / "7q1E-puAU4_12.09.mp4").write_bytes(tiny_clip())
    (tmp_path / ("x" * 200 + ".mp4")).write_bytes(tiny_clip())
    rows = [("7q1E-puAU4_12.09.mp4", "dog", "train"), ("x" * 200 + ".mp4", "dog", "train")]
    keys = _build(_csv(tmp_path, rows), tmp_path / "out").manifest.shards[0].keys
    assert keys[0] == "7q1E-puAU4_12-09"
    assert keys[0].rpartition("_")[0] == "7q1E-puAU4"
    assert len(keys[1]) <= 90


def test_strict_names_the_first_fault_and_writes_no_manifest(tmp_path: Path) -> None:
    source = _faulty_source(tmp_path / "clips")
    with pytest.raises(DataError, match=r"8 clips rejected; the first is .*silent\.mp4: no audio track"):
        _build(source, tmp_path / "out", strict=True)
    assert not (tmp_path / "out/manifest.json").exists()
    assert _build(source, tmp_path / "out").manifest.shards[0].count == 1


def test_build_without_good_clips_leaves_no_output(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"text")
    with pytest.raises(DataError, match=r"no clip could be taken; the first is .*a\.mp4: not a video"):
        _build(_csv(tmp_path, [("a.mp4", "dog", "train")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_the_user_survive_a_build_without_good_clips(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="no clip could be taken"):
        _build(_csv(tmp_path, [("a.mp4", "dog", "train")]), tmp_path / "out")
    assert _files(tmp_path / "out") == {"notes.txt": b"mine"}


class _KilledError(Exception):
    """Stands for a kill: raised from the progress callback, between two class-splits."""


def test_interrupted_build_does_not_repeat_finished_shards(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    output = tmp_path / "out"

    def kill_halfway(done: int, total: int) -> None:
        if 2 * done >= total:
            raise _KilledError

    with pytest.raises(_KilledError):
        _build(source, output, progress=kill_halfway)
    assert not (output / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")}
    assert len(finished) == 3
    _build(source, output)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    _build(source, tmp_path / "fresh")
    assert _files(output) == _files(tmp_path / "fresh")


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
import psutil
from data_shards.build import build_shards

def kill_me(done, total):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    build_shards(
        Path(sys.argv[1]), sys.argv[2], clips_per_shard=2, min_seconds=0.5, processes=2, progress=kill_me
    )
"""


@pytest.mark.slow
def test_killed_build_leaves_no_process_and_continues(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    (tmp_path / "killed.py").write_text(KILLED_BUILD)
    words = [sys.executable, str(tmp_path / "killed.py"), str(source), str(tmp_path / "out")]
    project = Path(__file__).parents[2]
    # what a killed process leaves among the temporary files goes with this folder; a socket's path must be short
    with tempfile.TemporaryDirectory() as temporary:
        environment = os.environ | {"PYTHONPATH": str(project), "TMPDIR": temporary}
        killed = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    children, deadline = [int(pid) for pid in killed.stdout.split()], time.monotonic() + 20
    while not all(map(has_ended, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [child for child in children if not has_ended(child)] == []
    assert not (tmp_path / "out/manifest.json").exists()
    _build(source, tmp_path / "out")
    _build(source, tmp_path / "fresh")
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh")


def test_a_lost_shard_or_changed_clip_is_built_again_on_resume(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips", val=0, test=0)
    bad = tmp_path / "clips/train/class_001/train-001-00001.mp4"
    good_bytes = bad.read_bytes()
    bad.write_bytes(b"text")
    with pytest.raises(DataError, match="1 clip rejected"):
        _build(source, tmp_path / "out", strict=True)
    next((tmp_path / "out/train").glob("c000-*-0001.tar")).unlink()
    bad.write_bytes(good_bytes)
    _build(source, tmp_path / "out", strict=True)
    _build(source, tmp_path / "fresh")
    tars = {name: data for name, data in _files(tmp_path / "out").items() if name.endswith(".tar")}
    assert tars == {name: data for name, data in _files(tmp_path / "fresh").items() if name.endswith(".tar")}


def test_resume_with_other_settings_leaves_no_unlisted_tar(tmp_path: Path) -> None:
    source = _faulty_source(tmp_path / "clips")
    for name in ("b.mp4", "c.mp4"):
        (tmp_path / "clips" / name).write_bytes(tiny_clip())
    source.write_text(source.read_text() + "b.mp4,dog,train\nc.mp4,dog,train\n")
    with pytest.raises(DataError, match="rejected"):
        _build(source, tmp_path / "out", clips_per_shard=1, strict=True)
    manifest = _build(source, tmp_path / "out", clips_per_shard=3).manifest
    assert [shard.url for shard in manifest.shards] == ["train/c000-dog-0000.tar", "train/c000-dog-0002.tar"]
    names = sorted(path.name for path in (tmp_path / "out/train").iterdir())
    assert names == ["c000-dog-0000.tar", "c000-dog-0002.tar"]


def test_repeated_build_changes_nothing_and_is_reported_as_unchanged(tmp_path: Path) -> None:
    source = _faulty_source(tmp_path / "clips")
    first = _build(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    second = _build(source, tmp_path / "out")
    assert not first.unchanged
    assert second.unchanged
    assert second.rejected == first.rejected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_output_of_another_build_is_never_overwritten(tmp_path: Path) -> None:
    source = render_tiny(tmp_path / "clips")
    _build(source, tmp_path / "out")
    before = _files(tmp_path / "out")
    with pytest.raises(ConfigError, match="other clips or with other settings"):
        _build(source, tmp_path / "out", clips_per_shard=3)
    assert _files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label,split\na.mp4,dog,train\n", "its header is"),
        ("path,label,split\na.mp4,dog,training\n", "line 2: split 'training'"),
        ("path,label,split\na.mp4,,train\n", "line 2: needs a path"),
        ("path,label,split\na.mp4,dog,train,more\n", "line 2: needs a path"),
        ("path,label,split\n", "no clips"),
    ],
)
def test_faulty_csv_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        _build(tmp_path / "list.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_column_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(tiny_clip())
    (tmp_path / "list.csv").write_text("path,label,split,source\na.mp4,dog,train,video-9\n")
    shard = _build(tmp_path / "list.csv", tmp_path / "out").manifest.shards[0]
    content = (tmp_path / "out" / shard.url).read_bytes()
    start, size = shard.offsets["json"][0], shard.sizes["json"][0]
    assert json.loads(content[start : start + size])["source"] == "video-9"
