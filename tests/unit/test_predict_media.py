"""Prediction of media files: by a stream of clips, and by one of features whose encoders the manifest records."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.errors import ConfigError
from avcil_dist.inference import step_predictions
from avcil_dist.inference.step_predictions import StepRequest, predict_step
from avcil_dist.methods import make_method
from avcil_dist.streams.artifact import StepArtifact, save_artifact
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.score_metrics import probabilities
from avcil_dist.streams.stream import scenario_of, stream_url
from avcil_dist.training.build import network_after
from data_shards.features import make_features
from launch.local_worlds import current_world
from launch.prediction import find_files
from tests.helpers.rendered import tiny_manifest
from tests.helpers.streams import avcil
from tests.unit.test_feature_shards import CPU, TINY

NAMES = ("cat", "dog", "cow")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_predictions, "set_threads", lambda world: None)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return tiny_manifest(tmp_path_factory.mktemp("clips"), NAMES, {"train": 1, "val": 1, "test": 2})


@pytest.fixture(scope="module")
def features(clips: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    config = load_config("features", (*TINY, f"data.manifest={clips.root}/manifest.json"))
    return make_features(config, str(tmp_path_factory.mktemp("features")), batch=4, device=CPU).manifest


@pytest.fixture(scope="module")
def folder(clips: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test clips as files, named by their keys."""
    folder = tmp_path_factory.mktemp("videos")
    for number in clips.clips(NAMES, "test"):
        shard, row = clips.locate(int(number))
        start, size = (
            int(values[row]) for values in (clips.shards[shard].offsets["mp4"], clips.shards[shard].sizes["mp4"])
        )
        (folder / f"{clips.key(int(number))}.mp4").write_bytes(
            Path(clips.url(shard)).read_bytes()[start : start + size]
        )
    return folder


def commit(config: Config) -> str:
    """Commit a step 0 of all classes with initial weights; returns the stream."""
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    torch.manual_seed(0)
    network = network_after(config, manifest.shape, scenario, make_method(config.method), 0)
    metrics = StreamMetrics.after(
        None, step=0, row=[0.5], seen=0.5, per_class={}, num_test_clips=6, epoch=0, val_accuracy=None
    )
    artifact = StepArtifact(0, network.state_dict(), {}, EMPTY_MEMORY, scenario, metrics, config, manifest.content_hash)
    save_artifact(stream_url(config), artifact)
    return stream_url(config)


def of_features(features: Manifest, output: Path) -> str:
    return commit(
        load_config(
            "demo",
            [
                f"data.manifest={features.root}/manifest.json",
                f"output={output}",
                "scenario.classes_per_step=3",
                "model.visual={kind: precomputed}",
                "model.audio={kind: precomputed}",
            ],
        )
    )


def expected(stream: str) -> dict[str, np.ndarray]:
    """Probabilities of the test clips by the evaluation of the data set."""
    made = predict_step(StepRequest(stream), current_world())
    return dict(zip(made.keys, probabilities(made.predicted.scores), strict=True))


def predicted(*words: object) -> dict[str, list[float]]:
    """Probabilities of `avcil predict --json`, by the stem of the file, in the order of the classes."""
    result = avcil("predict", *words, "--json", "--top", 3)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["predictions"]
    return {
        Path(one["clip"]).stem: [next(c["probability"] for c in one["classes"] if c["class"] == name) for name in NAMES]
        for one in found
    }


def check(found: dict[str, list[float]], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for key, chances in found.items():
        np.testing.assert_allclose(chances, wanted[key], atol=1e-3)


def test_a_stream_of_features_predicts_files_with_the_encoders_that_made_them(
    features: Manifest, folder: Path, tmp_path: Path
) -> None:
    assert features.encoders is not None
    assert features.encoders.settings["model.visual.kind"] == "videomae"
    assert set(features.encoders.sha256) == {"visual", "audio"}
    stream = of_features(features, tmp_path)
    wanted = expected(stream)
    check(predicted(stream, folder), wanted)
    listing = tmp_path / "list.csv"
    listing.write_text("path\n" + "".join(f"{file}\n" for file in sorted(folder.iterdir())))
    check(predicted(stream, listing), wanted)
    result = avcil("export", stream, "--output", tmp_path / "export")
    assert result.exit_code == 0, result.output
    check(predicted(tmp_path / "export", folder), wanted)


def test_other_weights_than_those_of_the_features_are_refused(features: Manifest, folder: Path, tmp_path: Path) -> None:
    assert features.encoders is not None
    others = features.encoders.model_copy(update={"settings": features.encoders.settings | {"seed": 1}})
    replace(features, encoders=others).save(f"{features.root}/other.json")
    stream = of_features(features, tmp_path)
    refused = avcil("predict", stream, folder, "--manifest", f"{features.root}/other.json")
    assert refused.exit_code == 2
    assert "its features are of other visual weights" in refused.output
    replace(features, encoders=None).save(f"{features.root}/unknown.json")
    refused = avcil("predict", stream, folder, "--manifest", f"{features.root}/unknown.json")
    assert refused.exit_code == 2
    assert "does not record their encoders" in refused.output


def test_a_manifest_names_no_code_to_import(features: Manifest, folder: Path, tmp_path: Path) -> None:
    assert features.encoders is not None
    others = features.encoders.model_copy(
        update={"settings": features.encoders.settings | {"model.visual.kind": "antigravity:geohash"}}
    )
    replace(features, encoders=others).save(f"{features.root}/code.json")
    refused = avcil("predict", of_features(features, tmp_path), folder, "--manifest", f"{features.root}/code.json")
    assert refused.exit_code == 2
    assert "antigravity" in refused.output
    assert "antigravity" not in sys.modules


def test_files_that_cannot_be_decoded_are_named_and_left_out(clips: Manifest, folder: Path, tmp_path: Path) -> None:
    config = load_config(
        "demo", [f"data.manifest={clips.root}/manifest.json", f"output={tmp_path}", "scenario.classes_per_step=3"]
    )
    stream = commit(config)
    check(predicted(stream, folder), expected(stream))
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    output = tmp_path / "predictions.csv"
    result = avcil("predict", stream, bad, *sorted(folder.iterdir())[:2], "--top", 2, "--output", output)
    assert result.exit_code == 3, result.output
    assert "bad.mp4" in result.stderr
    assert "1 of 3 clips were left out" in result.stderr
    lines = output.read_text().splitlines()
    assert lines[0] == "key,prediction,p:cat,p:dog,p:cow"
    assert lines[1] == f"{bad},,,,"
    shown = result.stdout.splitlines()
    assert [bool(re.match(r"  0\.\d{3}  (cat|dog|cow)$", line)) for line in shown[:6]] == 2 * [False, True, True]
    named = avcil("predict", stream, f"{folder}/")
    assert [line.partition(": ")[0] for line in named.stdout.splitlines()] == sorted(map(str, folder.iterdir()))
    useless = avcil("predict", stream, "--output", output, "--top", 2, "--json")
    assert "--top, --json: of no use without CLIPs" in useless.stderr
    assert "--split: of no use with CLIPs" in avcil("predict", stream, bad, "--split", "val").stderr
    alone = avcil("predict", stream, bad)
    assert alone.exit_code == 2
    missing = avcil("predict", stream, tmp_path / "none.mp4")
    assert missing.exit_code == 2
    assert "no such file or folder" in missing.output


def test_a_stream_of_clips_predicts_without_its_shards(clips: Manifest, folder: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(clips.root, tmp_path / "shards")
    settings = [f"data.manifest={shards}/manifest.json", f"output={tmp_path}", "scenario.classes_per_step=3"]
    stream = commit(load_config("demo", settings))
    wanted = expected(stream)
    shutil.rmtree(shards)
    check(predicted(stream, folder), wanted)


def test_a_source_without_clips_is_refused(tmp_path: Path) -> None:
    listing, blank, empty = tmp_path / "list.csv", tmp_path / "blank.csv", tmp_path / "videos"
    listing.write_text("path,start\n")
    blank.write_text("path,start\n,3\n")
    empty.mkdir()
    clip = tmp_path / "clip.mp4"
    clip.touch()
    for source in (listing, blank, empty):
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(source))}: no clips; a folder needs videos"):
            find_files([str(clip), str(source)])
