import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.errors import DataError
from data_shards.random_features import make_feature_shards
from data_shards.verify import TableRow, repair_manifest, shard_table, verify_shards
from launch.cli.shards import shards


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_feature_shards(tmp_path / "data", classes=2, clips={"train": 20, "test": 3}, dim=8)


def _path(url: str, number: int) -> Path:
    return Path(load_manifest(url).url(number))


def test_good_shards_have_no_faults(url: str) -> None:
    seen: list[tuple[int, int]] = []
    assert verify_shards(url, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(n, 6) for n in range(1, 7)]


def test_flipped_byte_is_found(url: str) -> None:
    path = _path(url, 1)
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    faults = verify_shards(url)
    assert len(faults) == 1
    assert str(path) in faults[0]
    assert "sha256" in faults[0]


def test_tar_cut_at_a_block_is_found(url: str) -> None:
    path = _path(url, 0)
    path.write_bytes(path.read_bytes()[: 512 * 6])
    faults = verify_shards(url)
    assert len(faults) == 1
    assert f"{path}: 3072 bytes" in faults[0]


def test_missing_shard_is_found_beside_other_faults(url: str) -> None:
    _path(url, 0).unlink()
    _path(url, 3).write_bytes(b"")
    faults = verify_shards(url)
    assert len(faults) == 2
    assert "missing" in faults[0]
    assert "0 bytes" in faults[1]


def _rerecord(url: str, number: int, content: bytes) -> None:
    """Write a shard and record its new size and digest, so that only its structure is wrong."""
    manifest = load_manifest(url)
    _path(url, number).write_bytes(content)
    shards_ = list(manifest.shards)
    shards_[number] = replace(shards_[number], bytes=len(content), sha256=storage.sha256(content))
    Manifest(manifest.kind, manifest.classes, tuple(shards_), manifest.shape, manifest.root).save(url)


def test_renamed_member_is_found_though_the_digest_agrees(url: str) -> None:
    content = _path(url, 2).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        infos = tar.getmembers()
        members = [(info.name, tar.extractfile(info).read()) for info in infos]  # type: ignore[union-attr]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo("stranger.audio.npy" if name == members[1][0] else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _rerecord(url, 2, buffer.getvalue())
    faults = verify_shards(url)
    assert len(faults) == 2
    assert f"{members[1][0]}: (offset, size) missing" in " ".join(faults)
    assert "stranger.audio.npy" in " ".join(faults)


def test_file_that_is_no_tar_is_found_though_the_digest_agrees(url: str) -> None:
    _rerecord(url, 2, b"x" * _path(url, 2).stat().st_size)
    assert "not a tar" in verify_shards(url)[0]


def test_wrong_label_inside_a_clip_is_found(url: str) -> None:
    content = _path(url, 2).read_bytes()
    assert content.count(b'"class_000"') == 3
    _rerecord(url, 2, content.replace(b'"class_000"', b'"class_001"', 1))
    faults = verify_shards(url)
    assert len(faults) == 1
    assert "test-000-00000.json: class and split ('class_001', 'test')" in faults[0]


def test_table_counts_per_class_and_split(url: str) -> None:
    manifest = load_manifest(url)
    rows = shard_table(manifest)
    size = manifest.shards[0].bytes + manifest.shards[1].bytes
    assert rows[0] == TableRow("class_000", "train", 2, 20, size)
    assert [(row.class_name, row.split, row.clips) for row in rows[1:]] == [
        ("class_000", "test", 3),
        ("class_001", "train", 20),
        ("class_001", "test", 3),
    ]


@pytest.mark.slow
def test_commands_render_build_verify_and_list(tmp_path: Path) -> None:
    run = CliRunner().invoke
    clips, output = str(tmp_path / "clips"), str(tmp_path / "out")
    words = ["--classes", "2", "--train", "2", "--val", "0", "--test", "1", "--seconds", "1", "--size", "32"]
    for line in (
        ["synth", clips, *words, "--processes", "1"],
        ["build", f"{clips}/clips.csv", output, "--processes", "1"],
        ["verify", f"{output}/manifest.json"],
    ):
        result = run(shards, line)
        assert result.exit_code == 0, result.output
    listed = run(shards, ["ls", f"{output}/manifest.json"]).output
    assert load_manifest(f"{output}/manifest.json").content_hash in listed
    assert [line.split()[:4] for line in listed.splitlines()[1:3]] == [
        ["class_000", "train", "1", "2"],
        ["class_000", "test", "1", "1"],
    ]
    again = run(shards, ["build", f"{clips}/clips.csv", output, "--processes", "1"])
    assert "unchanged" in again.output


@pytest.mark.slow
def test_verify_command_prints_the_faults_and_raises(url: str) -> None:
    _path(url, 0).unlink()
    result = CliRunner().invoke(shards, ["verify", url])
    assert isinstance(result.exception, DataError)
    assert "1 faults" in str(result.exception)
    assert "missing" in result.output


def test_manifest_changed_by_hand_is_refused(url: str) -> None:
    document = json.loads(Path(url).read_text())
    document["shards"][0]["count"] += 1
    Path(url).write_text(json.dumps(document))
    with pytest.raises(DataError, match="hash"):
        verify_shards(url)


def test_a_content_hash_that_is_not_of_the_clips_is_a_fault(url: str) -> None:
    document = json.loads(Path(url).read_text()) | {"content_hash": "0" * 64}
    del document["hash"]
    digest = storage.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    storage.write_json(url, document | {"hash": digest})
    assert verify_shards(url) == [f"{url}: its content hash is not that of its shards and clips; build it again"]


def test_repair_lists_the_intact_shards_and_keeps_the_old_manifest(url: str) -> None:
    before = load_manifest(url)
    _path(url, 0).unlink()
    for number in (3, 4, 5):  # all of class_001
        _path(url, number).write_bytes(b"")
    repaired, faults = repair_manifest(url)
    assert len(faults) == 4
    assert [shard.url for shard in repaired.shards] == [before.shards[number].url for number in (1, 2)]
    assert repaired.classes == ("class_000",)
    assert load_manifest(url).content_hash == repaired.content_hash
    assert verify_shards(url) == []
    _path(url, 1).unlink()
    repair_manifest(url)
    old = [load_manifest(url.replace("manifest.json", f"manifest.before-repair{end}.json")) for end in ("", "-2")]
    assert [manifest.content_hash for manifest in old] == [before.content_hash, repaired.content_hash]


def test_repair_changes_nothing_without_faults_or_without_intact_shards(url: str) -> None:
    before = Path(url).read_bytes()
    assert repair_manifest(url)[1] == []
    assert not Path(url).with_name("manifest.before-repair.json").exists()
    for number in range(6):
        _path(url, number).unlink()
    with pytest.raises(DataError, match="no shard is intact"):
        repair_manifest(url)
    assert Path(url).read_bytes() == before


@pytest.mark.slow
def test_processes_find_the_same_faults(url: str) -> None:
    _path(url, 0).unlink()
    _path(url, 4).write_bytes(b"")
    assert verify_shards(url, processes=2) == verify_shards(url)


@pytest.mark.slow
def test_repair_command_reports_the_intact_shards(url: str) -> None:
    _path(url, 0).unlink()
    result = CliRunner().invoke(shards, ["verify", url, "--repair", "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert "repaired: 5 intact shards, 30 clips; 1 faults" in result.output


def test_table_ends_with_sums_per_split(url: str) -> None:
    lines = CliRunner().invoke(shards, ["ls", url]).output.splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("all")][:2] == [
        ["all", "train", "4", "40"],
        ["all", "test", "2", "6"],
    ]
    assert lines[-2].split()[:3] == ["all", "6", "46"]
