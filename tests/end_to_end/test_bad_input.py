"""Errors of a user: one line, exit code 2, no traceback, nothing half-written."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from avcil_dist.data.manifest import load_manifest
from tests.helpers.rendered import render_tiny
from tests.helpers.streams import avcil, train, write_config


def _refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    [line] = [line for line in result.output.splitlines() if line.startswith("avcil: ")]
    for part in parts:
        assert part in line


def _nothing_written(folder: Path) -> None:
    assert not (folder / "runs").exists()


def test_unknown_key(tmp_path: Path) -> None:
    _refused(avcil("train", write_config(tmp_path), "optim.lrr=1"), "command line: optim.lrr", "did you mean 'lr'?")
    _nothing_written(tmp_path)


def test_missing_configuration(tmp_path: Path) -> None:
    _refused(avcil("train", tmp_path / "nowhere.yaml"), "nowhere.yaml", "no such file", "demo")


def test_missing_manifest(tmp_path: Path) -> None:
    _refused(avcil("train", write_config(tmp_path), f"data.manifest={tmp_path}/none.json"), "none.json: missing")
    _nothing_written(tmp_path)


@pytest.mark.parametrize("output", ["/dev/null/x", "FILE", "FILE/x"])
def test_output_that_cannot_be_a_folder(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = output.replace("FILE", f"{tmp_path}/file")
    _refused(avcil("train", write_config(tmp_path), f"output={folder}"), folder, "cannot be written")
    assert (tmp_path / "file").read_bytes() == b""


def test_manifest_on_a_server_of_a_stranger(tmp_path: Path) -> None:
    for url in ("reference://k::http://127.0.0.1:1/e.json", "http://127.0.0.1:1/m.json"):
        _refused(avcil("train", write_config(tmp_path), f"data.manifest={url}"), "data.manifest")
        _refused(avcil("shards", "ls", url), url)
    _nothing_written(tmp_path)


def test_missing_shard_is_named_before_training(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    gone = sorted((tmp_path / "shards").rglob("train/c004*.tar"))[0]
    gone.unlink()
    _refused(avcil("train", config, "-n", 2), gone.name, "missing")
    assert not list(tmp_path.rglob("model.safetensors"))


def test_shard_cut_short_is_named_before_training(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    cut = sorted((tmp_path / "shards").rglob("test/c000*.tar"))[0]
    cut.write_bytes(cut.read_bytes()[:-512])
    _refused(avcil("train", config), cut.name, "bytes, the manifest has")


def test_batch_that_the_processes_cannot_share(tmp_path: Path) -> None:
    _refused(
        avcil("train", write_config(tmp_path), "-n", 5), "optim.global_batch=12", "5 processes", "1, 2, 3, 4, 6, 12"
    )
    _nothing_written(tmp_path)


def test_batch_larger_than_a_step(tmp_path: Path) -> None:
    _refused(
        avcil("train", write_config(tmp_path), "optim.global_batch=64"), "optim.global_batch=64", "step 1 has only 48"
    )
    _nothing_written(tmp_path)


def test_class_in_no_step(tmp_path: Path) -> None:
    _refused(avcil("train", write_config(tmp_path), "scenario.classes_per_step=[3,2]"), "'class_005' is in no step")
    _nothing_written(tmp_path)


def test_class_that_the_data_do_not_have(tmp_path: Path) -> None:
    _refused(avcil("train", write_config(tmp_path), "scenario.classes=[class_000,dog]"), "'dog' is not in the data")


def test_memory_too_small_for_the_classes(tmp_path: Path) -> None:
    _refused(avcil("train", write_config(tmp_path), "memory.size=4"), "memory.size=4")


def test_features_for_a_network_that_takes_clips(tmp_path: Path) -> None:
    words = ("model.visual.kind=small", "model.audio.kind=small")
    _refused(avcil("train", write_config(tmp_path), *words), "holds features", "model.visual.kind=small")


def test_settings_changed_between_steps(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = Path(train(config))
    for file in (stream / "step_002").iterdir():
        file.unlink()
    _refused(avcil("train", config, "optim.lr=0.1"), "optim.lr=0.003, not 0.1", "--restart")


def test_settings_changed_after_the_last_step(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    train(config)
    _refused(avcil("train", config, "optim.lr=0.1"), "step 2 was made with optim.lr=0.003, not 0.1")


def test_data_changed_between_steps(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = Path(train(config))
    (stream / "step_002" / "COMMITTED.json").unlink()
    whole = load_manifest(f"{tmp_path}/shards/manifest.json")
    fewer = replace(whole, shards=whole.shards[1:])
    fewer.save(f"{tmp_path}/shards/fewer.json")
    _refused(avcil("train", config, f"data.manifest={tmp_path}/shards/fewer.json"), "other data", "fewer.json")


def test_damaged_artifact_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = Path(train(config))
    (stream / "step_002" / "COMMITTED.json").unlink()
    weights = stream / "step_001" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    _refused(avcil("train", config), "step_001/model.safetensors", "damaged")


def test_eval_of_a_stream_that_is_not_there(tmp_path: Path) -> None:
    _refused(avcil("eval", tmp_path), "no committed step (searched")


def test_clips_damaged_after_the_build_stop_the_step_by_name(tmp_path: Path) -> None:
    csv = render_tiny(tmp_path / "clips")
    assert avcil("shards", "build", csv, tmp_path / "shards").exit_code == 0
    manifest = tmp_path / "shards" / "manifest.json"
    config = tmp_path / "clips.yaml"
    config.write_text(
        f"extends: demo\nname: damaged\noutput: {tmp_path}/runs\n"
        f"data: {{manifest: {manifest}}}\nscenario: {{classes_per_step: 1}}\n"
        "memory: {size: 4}\n"
        "optim: {epochs: 1, global_batch: 2, global_replay_batch: 2, global_eval_batch: 2, keep_epoch: last}\n"
    )
    shard = sorted((tmp_path / "shards").rglob("train/c000*.tar"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:512] + bytes(len(content) - 512))  # the size is right, the videos are gone
    _refused(avcil("train", config, "-n", 2), "damaged clips in an epoch", "max_bad_fraction")


@pytest.mark.parametrize("words", [("train",), ("train", "demo", "-n", "0"), ("shards", "ls")])
def test_wrong_usage_prints_the_usage(words: tuple[str, ...]) -> None:
    result = avcil(*words)
    assert result.exit_code == 2
    assert "Usage:" in result.output
