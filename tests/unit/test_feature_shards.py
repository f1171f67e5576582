import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config, DataConfig
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.models.encoders.frozen import recorded_encoders
from data_shards.build import build_shards
from data_shards.build_plan import Part, merge_parts
from data_shards.features import make_features, make_features_part
from data_shards.verify import verify_shards
from launch.cli.main import cli
from tests.helpers.rendered import render_tiny

TINY = (
    "data.decode_workers=0",
    "data.clip.frames=4",
    "data.clip.size=32",
    "data.clip.mel_frames=64",
    "data.clip.mel_bins=32",
    *(
        f"model.{name}.{key}"
        for name in ("visual", "audio")
        for key in ("weights=random", "dim=32", "depth=1", "heads=2")
    ),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The manifest of 14 clips of 2 classes, 2 in a shard; the bytes of one of them are damaged."""
    folder = tmp_path_factory.mktemp("clips")
    report = build_shards(
        render_tiny(folder / "clips", train=5), f"{folder}/shards", clips_per_shard=2, min_seconds=0.5
    )
    shard = report.manifest.shards[0]
    path = Path(report.manifest.url(0))
    data = bytearray(path.read_bytes())
    start, size = int(shard.offsets["mp4"][1]), int(shard.sizes["mp4"][1])
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    return report.manifest_url


def _config(clips: str, *more: str) -> Config:
    return load_config("features", (*TINY, f"data.manifest={clips}", *more))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _members(manifest: Manifest, number: int) -> list[dict[str, bytes]]:
    shard, content = manifest.shards[number], Path(manifest.url(number)).read_bytes()
    return [
        {name: content[shard.offsets[name][row] :][: shard.sizes[name][row]] for name in shard.offsets}
        for row in range(shard.count)
    ]


def test_features_are_those_of_the_encoders_in_float16(clips: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = _config(clips)
    report = make_features(
        config, str(tmp_path), batch=3, device=CPU, progress=lambda done, total: seen.append((done, total))
    )
    manifest, source = report.manifest, load_manifest(clips)
    assert manifest.kind == "feature"
    assert manifest.shape == {"frames": 2, "positions": 4, "dim": 32}
    assert seen[-1] == (14, 14)
    assert [shard.url for shard in manifest.shards] == [shard.url for shard in source.shards]
    assert [(r.kind, r.label, r.split, r.path) for r in report.rejected] == [
        ("corrupt", "class_000", "train", source.shards[0].keys[1])
    ]
    assert verify_shards(report.manifest_url) == []
    clip, features = _members(source, 1), _members(manifest, 1)
    visual = np.load(io.BytesIO(features[1]["visual.npy"]))
    assert (visual.shape, visual.dtype) == ((8, 32), np.float16)
    assert json.loads(features[1]["json"]) == json.loads(clip[1]["json"])

    from data_shards.features import _build_encoders, _features

    encoders = _build_encoders(config, source, CPU)
    rows = FixedSampler(source.first_clips[1] + np.arange(2)[None])
    (batch,) = load_batches(rows, manifest=source, labels={"class_000": 0}, data=config.data)
    expected_visual, expected_audio = _features(encoders, batch)
    np.testing.assert_allclose(visual, expected_visual[1], atol=2e-3)
    np.testing.assert_allclose(np.load(io.BytesIO(features[1]["audio.npy"])), expected_audio[1], atol=2e-3)


def test_ranks_and_parts_give_the_bytes_of_one_run(clips: str, tmp_path: Path) -> None:
    config = _config(clips)
    whole = make_features(config, f"{tmp_path}/whole", batch=2, device=CPU)
    for part in range(2):
        for rank in (1, 0):
            share = Part(part, 2).of_rank(rank, 2)
            assert make_features_part(config, f"{tmp_path}/parts", share, batch=2, device=CPU) is None
    merged = merge_parts(f"{tmp_path}/parts")
    assert merged.manifest.content_hash == whole.manifest.content_hash
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def test_missing_clip_shard_stops_the_run_by_name(clips: str, tmp_path: Path) -> None:
    manifest = load_manifest(clips)
    lost = Path(manifest.url(1))
    kept = lost.rename(tmp_path / "kept.tar")
    try:
        with pytest.raises(DataError, match=rf"{lost.name}: cannot be read .* start again to continue"):
            make_features(_config(clips), f"{tmp_path}/out", batch=2, device=CPU)
    finally:
        kept.rename(lost)
    resumed = make_features(_config(clips), f"{tmp_path}/out", batch=2, device=CPU)
    assert sum(shard.count for shard in resumed.manifest.shards) == 13


def test_an_interrupted_trial_with_a_limit_leaves_no_clip_out(clips: str, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_features(_config(clips, "data.limit.train=1"), f"{tmp_path}/out", batch=2, device=CPU, progress=interrupt)
    whole = make_features(_config(clips), f"{tmp_path}/whole", batch=2, device=CPU)
    after = make_features(_config(clips), f"{tmp_path}/out", batch=2, device=CPU)
    assert (after.manifest.content_hash, after.rejected) == (whole.manifest.content_hash, whole.rejected)


def test_command_under_torchrun_encodes_the_share_of_its_rank(clips: str, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        environment = {"RANK": rank, "WORLD_SIZE": "2"} | local
        words = ["shards", "features", clips, f"{tmp_path}/ranks", *TINY, "--batch", "2"]
        result = CliRunner(env=environment).invoke(cli, words)
        assert result.exit_code == 0, result.output
        assert ("avcil shards merge" in result.output) == (rank == "0")  # rank 0 prints for all
    merged = merge_parts(f"{tmp_path}/ranks")
    whole = make_features(_config(clips), f"{tmp_path}/whole", batch=2, device=CPU)
    assert merged.manifest.content_hash == whole.manifest.content_hash


def test_batch_size_changes_features_by_rounding_only(clips: str, tmp_path: Path) -> None:
    reports = [make_features(_config(clips), f"{tmp_path}/{batch}", batch=batch, device=CPU) for batch in (1, 4)]
    for number in range(len(reports[0].manifest.shards)):
        for one, other in zip(*(_members(report.manifest, number) for report in reports), strict=True):
            for name in ("visual.npy", "audio.npy"):
                np.testing.assert_allclose(np.load(io.BytesIO(one[name])), np.load(io.BytesIO(other[name])), atol=4e-3)


def test_precision_changes_features_by_rounding_only_and_is_recorded(clips: str, tmp_path: Path) -> None:
    reports = [
        make_features(_config(clips, f"engine.precision={name}"), f"{tmp_path}/{name}", batch=2, device=CPU)
        for name in ("float32", "bf16")
    ]
    full, half = (_members(report.manifest, 1) for report in reports)
    for name in ("visual.npy", "audio.npy"):
        pair = [np.load(io.BytesIO(members[0][name])).astype(np.float32) for members in (full, half)]
        error = np.abs(pair[0] - pair[1]).max() / np.abs(pair[0]).max()
        assert 0 < error < 0.05

    stream = _config(clips, "engine.precision=bf16")  # of another precision than the features
    for report, precision in zip(reports, ("float32", "bf16"), strict=True):
        assert report.manifest.encoders is not None
        assert recorded_encoders(report.manifest.encoders, stream, "m", CPU).precision == precision


class _KilledError(Exception):
    """Stands for a kill: raised in the middle of a shard."""


def test_killed_run_continues_with_its_unfinished_shard(clips: str, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done == 7:
            raise _KilledError

    config, output = _config(clips), tmp_path / "out"
    with pytest.raises(_KilledError):
        make_features(config, str(output), batch=1, device=CPU, progress=kill)
    finished = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar")}
    assert len(finished) >= 2
    seen: list[int] = []
    resumed = make_features(config, str(output), batch=1, device=CPU, progress=lambda done, _: seen.append(done))
    assert seen[0] > 0  # what was done counts from the start
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    fresh = make_features(config, f"{tmp_path}/fresh", batch=1, device=CPU)
    assert resumed.manifest.content_hash == fresh.manifest.content_hash
    assert make_features(config, str(output), batch=1, device=CPU).unchanged


def test_features_of_other_weights_do_not_mix(clips: str, tmp_path: Path) -> None:
    make_features_part(_config(clips), f"{tmp_path}/part", Part(0, 2), batch=2, device=CPU)
    with pytest.raises(ConfigError, match="other clips or settings"):
        make_features_part(_config(clips, "seed=1"), f"{tmp_path}/part", Part(1, 2), batch=2, device=CPU)
    make_features(_config(clips), f"{tmp_path}/whole", batch=2, device=CPU)
    with pytest.raises(ConfigError, match="made from other clips or with other settings"):
        make_features(_config(clips, "seed=1"), f"{tmp_path}/whole", batch=2, device=CPU)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.visual.train=full",), r"model\.visual\.train: full"),
        (("model.audio.dim=64",), r"model\.visual\.dim=32, model\.audio\.dim=64"),
    ],
)
def test_encoders_that_give_no_features_are_refused(
    clips: str, tmp_path: Path, words: tuple[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_features(_config(clips, *words), str(tmp_path), batch=2, device=CPU)


def test_encoders_without_weights_are_refused(clips: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.visual\.kind: small has no weights"):
        make_features(load_config("demo", [f"data.manifest={clips}"]), str(tmp_path), batch=2, device=CPU)
    with pytest.raises(ConfigError, match=r"model\.visual\.weights: missing"):
        load_config("features", [f"data.manifest={clips}"])


def test_command_makes_features_that_the_loader_reads(clips: str, tmp_path: Path) -> None:
    made = CliRunner().invoke(cli, ["shards", "features", clips, str(tmp_path), *TINY, "--batch", "4"])
    assert made.exit_code == 0, made.output
    assert "13 clips, 2 classes" in made.output
    assert "1 clip rejected" in made.output
    manifest = load_manifest(f"{tmp_path}/manifest.json")
    source = FixedSampler(manifest.clips(["class_001"], "train")[None])
    data = DataConfig(manifest=f"{tmp_path}/manifest.json")
    (batch,) = load_batches(source, manifest=manifest, labels={"class_001": 7}, data=data)
    assert batch.faults == ()
    assert batch.visual.shape == (5, 2, 4, 32)
    assert batch.labels.tolist() == [7] * 5
    assert batch.visual.abs().sum() > 0
