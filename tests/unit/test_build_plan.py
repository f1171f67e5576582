import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner

from avcil_dist import storage
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError
from data_shards.build import build_part, build_shards
from data_shards.build_plan import Part, Plan, ShardJob, merge_parts
from data_shards.verify import verify_shards
from launch.cli.shards import shards
from tests.helpers.rendered import remuxed, render_tiny, tiny_clip

SETTINGS = {"clips_per_shard": 2, "min_seconds": 0.5}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The csv of 14 good clips of 2 classes, one silent clip, and one that is missing."""
    folder = tmp_path_factory.mktemp("clips")
    source = render_tiny(folder, train=5)
    (folder / "silent.mp4").write_bytes(remuxed(tiny_clip(), sound=False))
    source.write_text(source.read_text() + "silent.mp4,class_000,train\ngone.mp4,class_001,test\n")
    return source


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_merged_parts_equal_a_single_build(clips: Path, tmp_path: Path) -> None:
    whole = build_shards(clips, f"{tmp_path}/whole", **SETTINGS)
    for index in (2, 0, 1):
        assert build_part(clips, f"{tmp_path}/parts", Part(index, 3), **SETTINGS) is None
        assert not (tmp_path / "parts/manifest.json").exists()
    merged = merge_parts(f"{tmp_path}/parts")
    assert merged.manifest.content_hash == whole.manifest.content_hash
    assert merged.rejected == whole.rejected
    assert {rejection.kind for rejection in merged.rejected} == {"silent", "missing"}
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def test_each_part_has_its_share_and_all_have_everything() -> None:
    jobs = tuple(ShardJob(f"train/{number}", "", clips) for number, clips in enumerate([9, 1, 1, 9, 1, 1, 9, 1, 1]))
    plan = Plan("clip", ("dog",), {}, "", jobs)
    shares = [plan.share(Part(index, 3)) for index in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(9))
    assert [sum(jobs[number].clips for number in share) for share in shares] == [11, 11, 11]
    assert Part(1, 2).of_rank(3, 4) == Part(7, 8)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "-1/2", "1/0"])
def test_impossible_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give i/n"):
        Part.parse(text)


def test_merge_names_the_first_missing_shard(clips: Path, tmp_path: Path) -> None:
    build_part(clips, str(tmp_path), Part(0, 2), **SETTINGS)
    with pytest.raises(DataError, match=r"of 10 shards are not done, the first is train/c000"):
        merge_parts(str(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


def test_merge_without_parts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no parts of a build"):
        merge_parts(str(tmp_path))


def test_merging_again_changes_nothing(clips: Path, tmp_path: Path) -> None:
    build_part(clips, str(tmp_path), Part(0, 1), **SETTINGS)
    first = merge_parts(str(tmp_path))
    before = _files(tmp_path)
    again = merge_parts(str(tmp_path))
    assert again.unchanged
    assert again.rejected == first.rejected
    assert _files(tmp_path) == before


def test_strict_merge_refuses_rejected_clips(clips: Path, tmp_path: Path) -> None:
    build_part(clips, str(tmp_path), Part(0, 1), **SETTINGS)
    with pytest.raises(DataError, match="2 clips rejected"):
        merge_parts(str(tmp_path), strict=True)
    assert not (tmp_path / "manifest.json").exists()


def test_parts_of_other_settings_do_not_mix(clips: Path, tmp_path: Path) -> None:
    build_part(clips, str(tmp_path), Part(0, 2), **SETTINGS)
    with pytest.raises(ConfigError, match="other clips or settings"):
        build_part(clips, str(tmp_path), Part(1, 2), **(SETTINGS | {"clips_per_shard": 3}))


def test_parts_of_copies_with_other_times_do_mix(clips: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in clips.parent.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(clips.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, (1, 1))
    build_part(clips, f"{tmp_path}/out", Part(0, 2), **SETTINGS)
    build_part(copy / "clips.csv", f"{tmp_path}/out", Part(1, 2), **SETTINGS)
    assert verify_shards(merge_parts(f"{tmp_path}/out").manifest_url) == []


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_merge_takes_no_results_of_an_earlier_plan(clips: Path, tmp_path: Path) -> None:
    output, listed = f"{tmp_path}/out", tmp_path / "clips.csv"
    header, *rows = (line for line in clips.read_text().splitlines() if "gone" not in line)  # the last one is silent

    def write_list(rows: list[str]) -> None:
        listed.write_text("\n".join([header, *(f"{clips.parent}/{row}" for row in rows), ""]))

    write_list(rows)
    with pytest.raises(DataError, match="1 clip rejected"):  # the results of all jobs are there
        build_shards(listed, output, strict=True, **SETTINGS)
    kept = sorted((tmp_path / "out").glob("*/c001-*.tar"))
    times = [path.stat().st_mtime_ns for path in kept]
    write_list(rows[1:-1])  # class_000 has one clip less
    with pytest.raises(KeyboardInterrupt):
        build_shards(listed, output, progress=_interrupt, **SETTINGS)
    with pytest.raises(DataError, match="shards are not done"):
        merge_parts(output)
    report = build_shards(listed, output, **SETTINGS)
    fresh = build_shards(listed, f"{tmp_path}/fresh", **SETTINGS)
    assert report.manifest.content_hash == fresh.manifest.content_hash
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_a_result_without_all_clips_of_its_job_counts_as_missing(clips: Path, tmp_path: Path) -> None:
    build_part(clips, str(tmp_path), Part(0, 1), **SETTINGS)
    result = min((tmp_path / "parts/train").glob("*.json"))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"shard": None, "rejected": []}))
    with pytest.raises(DataError, match="1 of 10 shards are not done"):
        merge_parts(str(tmp_path))
    assert build_shards(clips, str(tmp_path), **SETTINGS).manifest.first_clips[-1] == 14


KILLED_PART = """
import os, signal, sys
from pathlib import Path
from data_shards.build import build_part
from data_shards.build_plan import Part

def kill_in_the_middle_of_a_shard(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

build_part(Path(sys.argv[1]), sys.argv[2], Part(0, 2), clips_per_shard=2, min_seconds=0.5,
           progress=kill_in_the_middle_of_a_shard)
"""


@pytest.mark.slow
def test_killed_part_continues_and_leaves_nothing_behind(clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", KILLED_PART, str(clips), str(output)]
    assert subprocess.run(words, check=False, env=environment).returncode == -signal.SIGKILL
    left = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar*")}
    assert any(path.name.startswith(".") for path in left)  # a half-written shard, under no shard's name
    done = {path: time for path, time in left.items() if not path.name.startswith(".")}
    assert len(done) == 1
    build_part(clips, str(output), Part(0, 2), **SETTINGS)
    build_part(clips, str(output), Part(1, 2), **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    merge_parts(str(output))
    build_shards(clips, f"{tmp_path}/fresh", **SETTINGS)
    assert _files(output) == _files(tmp_path / "fresh")


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_shards_go_straight_to_a_url(clips: Path, tmp_path: Path, protocol: str) -> None:
    output = f"memory://{uuid.uuid4().hex}/data" if protocol == "memory" else f"file://{tmp_path}/data"
    for index in range(2):
        build_part(clips, output, Part(index, 2), **SETTINGS)
    merged = merge_parts(output)
    assert verify_shards(merged.manifest_url) == []
    assert merged.manifest.content_hash == build_shards(clips, f"{tmp_path}/local", **SETTINGS).manifest.content_hash
    assert not storage.exists(storage.join(output, "parts"))
    assert build_shards(clips, output, **SETTINGS).unchanged


@pytest.mark.slow
def test_commands_build_parts_and_merge_them(clips: Path, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(shards, list(words))
        assert result.exit_code == 0, result.output
        return result.output

    output = str(tmp_path / "out")
    for part in ("1/2", "2/2"):
        output_text = run("build", str(clips), output, "--clips-per-shard", "2", "--part", part, "--processes", "1")
        assert f"part {part} is done" in output_text
    output_text = run("merge", output)
    assert "14 clips, 2 classes" in output_text
    assert "2 clips rejected" in output_text
    header, row = (
        next(line for line in output_text.splitlines() if word in line).split() for word in ("missing", "class_000")
    )
    assert header == ["┃", "class", "┃", "missing", "┃", "silent", "┃", "all", "┃"]
    assert [word for word in row if word != "│"] == ["class_000", "1", "1"]
    assert (
        json.loads((tmp_path / "out/build.json").read_text())["content_hash"]
        == load_manifest(f"{output}/manifest.json").content_hash
    )
    result = CliRunner().invoke(shards, ["build", str(clips), output, "--part", "1/2", "--strict"])
    assert isinstance(result.exception, ConfigError)


def test_truncated_shard_is_built_again(clips: Path, tmp_path: Path) -> None:
    build_part(clips, str(tmp_path), Part(0, 1), **SETTINGS)
    shard = sorted(tmp_path.rglob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1024])
    build_part(clips, str(tmp_path), Part(0, 1), **SETTINGS)
    assert shard.read_bytes() == whole
