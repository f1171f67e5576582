"""Inference from a committed step: restored networks, scores of new clips, accuracies on a split."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.data.arrival import arrived
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.noise import InputNoise
from avcil_dist.data.shard import SPLITS
from avcil_dist.data.subset import load_data
from avcil_dist.errors import ArtifactError, ConfigError, DataError
from avcil_dist.inference import step_predictions
from avcil_dist.inference.evaluation import evaluation
from avcil_dist.inference.predict import CLIPS_PER_BATCH, Modality, Predictor, restore_step
from avcil_dist.inference.predictions_file import PredictionTable
from avcil_dist.inference.step_predictions import Condition, StepRequest, predict_step
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext
from avcil_dist.methods.sums_head import SumsHead
from avcil_dist.streams.artifact import StepArtifact, save_artifact
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.stream import scenario_of, stream_url
from avcil_dist.training.build import network_after
from data_shards.random_features import make_feature_shards
from launch.local_worlds import current_world
from launch.prediction import ModelRequest, load_stored
from tests.helpers.streams import avcil, write_config

CLASSES_PER_STEP = 3


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the number of threads of the test process as it is."""
    monkeypatch.setattr(step_predictions, "set_threads", lambda world: None)


def commit_first_step(folder: Path, *settings: str) -> tuple[str, StepArtifact]:
    """Commit a step 0 with initial weights; returns the stream's folder and the artifact."""
    config = load_config(str(write_config(folder)), [f"scenario.classes_per_step={CLASSES_PER_STEP}", *settings])
    manifest = load_data(config.data)
    scenario = scenario_of(config, manifest)
    torch.manual_seed(0)
    network = network_after(config, manifest.shape, scenario, make_method(config.method), 0)
    accuracies = dict.fromkeys(scenario.seen(0), 0.5)
    artifact = StepArtifact(
        step=0,
        model=network.state_dict(),
        method={},
        memory=EMPTY_MEMORY,
        scenario=scenario,
        metrics=StreamMetrics.after(
            None, step=0, row=[0.5], seen=0.5, per_class=accuracies, num_test_clips=30, epoch=0, val_accuracy=None
        ),
        config=config,
        manifest_hash=manifest.content_hash,
    )
    save_artifact(stream_url(config), artifact)
    return stream_url(config), artifact


def evaluate(stream: str, **request: Any) -> dict[str, Any]:
    return evaluation(predict_step(StepRequest(stream, **request), current_world()))


def test_each_clip_of_the_split_is_evaluated_once(tmp_path: Path) -> None:
    stream, _ = commit_first_step(tmp_path)
    found = evaluate(stream)
    assert (found["step"], found["split"], found["num_clips"]) == (0, "test", 30)
    assert found["task_accuracy"] == [found["seen_accuracy"]]
    assert found["task_il_accuracy"] == found["seen_accuracy"]  # there is one task
    assert found["seen_accuracy"] == pytest.approx(sum(found["per_class"].values()) / CLASSES_PER_STEP)


def test_predictions_are_written_clip_by_clip_and_agree_with_the_accuracy(tmp_path: Path) -> None:
    stream, artifact = commit_first_step(tmp_path)
    path = tmp_path / "predictions.csv"
    result = avcil("eval", stream, "--predictions", path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    header, *rows = csv.reader(path.open())
    seen = artifact.scenario.seen(0)
    assert header == ["key", "label", "prediction", *(f"p:{name}" for name in seen)]
    manifest = load_manifest(artifact.config.data.manifest)
    clips = manifest.clips(seen, "test")
    assert [row[0] for row in rows] == [manifest.key(clip) for clip in clips]
    assert [row[1] for row in rows] == [manifest.class_of(clip) for clip in clips]
    chances = np.array([row[3:] for row in rows], dtype=float)
    assert [row[2] for row in rows] == [seen[best] for best in chances.argmax(axis=1)]
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-5)
    accuracy = sum(row[1] == row[2] for row in rows) / len(rows)
    assert json.loads(result.output)["seen_accuracy"] == accuracy

    other = tmp_path / "predictions.npz"
    assert avcil("eval", stream, "--predictions", other, "--device", "cpu").exit_code == 0
    with np.load(other, allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["probabilities"], chances, rtol=1e-4)
        assert arrays["prediction"].tolist() == [row[2] for row in rows]
    refused = avcil("eval", stream, "--predictions", tmp_path / "predictions.txt")
    assert refused.exit_code == 2
    assert "written as .csv or .npz" in refused.output


def test_a_damaged_clip_has_no_prediction_and_is_wrong() -> None:
    scores = np.array([[0.0, 1.0], [np.nan, np.nan]])
    table = PredictionTable(["a", "b"], ["cat", "cat"], ["cat", "dog"], scores)
    assert table.predictions == ["dog", ""]


def test_a_split_without_clips_is_an_error_of_one_line(tmp_path: Path) -> None:
    stream, _ = commit_first_step(tmp_path)
    url = make_feature_shards(tmp_path / "other", classes=6, clips={"train": 24, "test": 10})
    with pytest.raises(DataError) as raised:
        evaluate(stream, split="val", manifest=str(url))
    assert f"{url}: no val clips of the 3 classes of step 0" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_clips_are_those_that_the_step_had(tmp_path: Path) -> None:
    stream, artifact = commit_first_step(tmp_path, "scenario.imbalance=8", "data.limit.test=2")
    url = artifact.config.data.manifest
    seen = artifact.scenario.seen(0)
    had = arrived(load_data(artifact.config.data), artifact.scenario, artifact.config.scenario, 0)
    counts = {split: had.num_clips(seen, split) for split in SPLITS}
    assert (counts["test"], counts["train"] < load_manifest(url).num_clips(seen, "train")) == (6, True)
    for manifest in (None, url):
        for split in ("train", "test"):
            assert evaluate(stream, split=split, manifest=manifest)["num_clips"] == counts[split]
        assert load_stored(ModelRequest(stream, manifest=manifest)).num_clips == counts
    other = make_feature_shards(tmp_path / "other", classes=6, clips={"train": 24, "test": 10})
    assert evaluate(stream, manifest=str(other))["num_clips"] == 30


def test_a_manifest_that_is_not_where_it_was_is_named_with_its_place_and_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, artifact = commit_first_step(tmp_path)
    changes = {"name": "moved", "data": artifact.config.data.model_copy(update={"manifest": "here/manifest.json"})}
    config = artifact.config.model_copy(update=changes)
    moved = stream_url(config)
    save_artifact(moved, replace(artifact, config=config))
    monkeypatch.chdir(tmp_path)
    for words in (("eval", moved), ("export", moved, "--output", tmp_path / "exported")):
        refused = avcil(*words)
        assert refused.exit_code == 2
        assert f"{tmp_path}/here/manifest.json: missing; --manifest names it where it is now" in refused.output


def test_a_step_that_is_not_committed_is_an_error(tmp_path: Path) -> None:
    nothing, (stream, _) = tmp_path / "nothing", commit_first_step(tmp_path)
    for step in (None, 0):
        with pytest.raises(
            ArtifactError, match=rf"^{nothing}: no committed step \(searched for .*; give the folder of"
        ):
            evaluate(str(nothing), step=step)
    with pytest.raises(ArtifactError, match=r"step_000: no committed step .*; that is the folder of a step; give the"):
        evaluate(f"{stream}/step_000")
    with pytest.raises(ArtifactError, match="step_007: no committed step artifact; run step 7 first"):
        evaluate(stream, step=7)
    refused = avcil("eval", stream, "--step", "-1")
    assert refused.exit_code == 2
    assert "Invalid value for '--step'" in refused.output


def test_noise_is_of_the_clip_and_the_seed_and_grows_with_its_level(tmp_path: Path) -> None:
    stream, _ = commit_first_step(tmp_path)

    def scores(noise: InputNoise | None) -> np.ndarray:
        return predict_step(StepRequest(stream, condition=Condition(noise=noise)), current_world()).predicted.scores

    plain, noisy = scores(None), scores(InputNoise(audio_db=10, visual_db=10))
    np.testing.assert_array_equal(noisy, scores(InputNoise(audio_db=10, visual_db=10)))
    assert not np.array_equal(noisy, scores(InputNoise(audio_db=10, visual_db=10, seed=1)))
    strong = scores(InputNoise(audio_db=0, visual_db=0))
    assert 0 < np.abs(noisy - plain).mean() < np.abs(strong - plain).mean()


@pytest.mark.parametrize("count", [1, CLIPS_PER_BATCH, 2 * CLIPS_PER_BATCH + 3])
def test_scores_of_features_are_those_of_the_restored_network(tmp_path: Path, count: int) -> None:
    stream, artifact = commit_first_step(tmp_path)
    shape = load_manifest(artifact.config.data.manifest).shape
    predictor = Predictor(artifact, shape, stream)
    assert predictor.takes_features
    assert predictor.classes == list(artifact.scenario.seen(0))
    random = torch.Generator().manual_seed(1)
    visual = torch.randn(count, shape["frames"], shape["positions"], shape["dim"], generator=random)
    audio = torch.randn(count, shape["dim"], generator=random)
    network, method = restore_step(artifact, shape, stream)
    with torch.no_grad():
        expected = method.scores(network.eval()(visual, audio))
    scores = predictor.score_features(visual, audio)
    assert scores.shape == (count, CLASSES_PER_STEP)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_no_clips_have_no_scores(tmp_path: Path) -> None:
    stream, artifact = commit_first_step(tmp_path)
    predictor = Predictor(artifact, load_manifest(artifact.config.data.manifest).shape, stream)
    assert predictor.score_clips([]).shape == (0, CLASSES_PER_STEP)


@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_a_method_without_a_head_for_one_modality_gets_zeros_as_the_other(tmp_path: Path, modality: Modality) -> None:
    stream, artifact = commit_first_step(tmp_path)
    shape = load_manifest(artifact.config.data.manifest).shape
    visual, audio = torch.randn(5, shape["frames"], shape["positions"], shape["dim"]), torch.randn(5, shape["dim"])
    zeroed = (torch.zeros_like(visual), audio) if modality == "audio" else (visual, torch.zeros_like(audio))
    found = Predictor(artifact, shape, stream, modality).score_features(visual, audio)
    torch.testing.assert_close(found, Predictor(artifact, shape, stream).score_features(*zeroed))
    assert evaluate(stream, condition=Condition(modality=modality))["modality"] == modality


@pytest.mark.parametrize(("missing", "kept"), [("audio", "visual"), ("visual", "audio")])
def test_without_a_modality_its_features_change_no_score(tmp_path: Path, missing: str, kept: Modality) -> None:
    """The head of the other modality is solved from the state in the artifact; the predictor ignores the input."""
    config = load_config(str(write_config(tmp_path)), ["scenario.classes_per_step=3", "method=analytic"])
    manifest = load_manifest(config.data.manifest)
    scenario, shape = scenario_of(config, manifest), manifest.shape
    method = make_method(config.method)
    assert isinstance(method, SumsHead)
    method.begin_step(StepContext(scenario, 0))
    network = network_after(config, shape, scenario, method, 0)
    random = torch.Generator().manual_seed(0)
    visual = torch.randn(60, shape["frames"], shape["positions"], shape["dim"], generator=random)
    audio, labels = torch.randn(60, shape["dim"], generator=random), torch.arange(60) % 3
    method.accumulate(network(visual, audio), labels)
    method.statistics()
    method.choose(method.solve(), [])
    artifact = StepArtifact(
        step=0,
        model={},
        method=method.state_dict(),
        memory=EMPTY_MEMORY,
        scenario=scenario,
        metrics=StreamMetrics.after(
            None, step=0, row=[0.5], seen=0.5, per_class={}, num_test_clips=30, epoch=0, val_accuracy=None
        ),
        config=config,
        manifest_hash=manifest.content_hash,
    )
    predictor = Predictor(artifact, shape, "here", kept)
    whole = Predictor(artifact, shape, "here").score_features(visual, audio)
    gone = torch.full_like(audio if missing == "audio" else visual, torch.nan)
    given = (visual, gone) if missing == "audio" else (gone, audio)
    scores = predictor.score_features(*given)
    assert scores.isfinite().all()
    assert not torch.allclose(scores, whole)
    kept = network(visual, audio)._replace(**{missing: None})
    torch.testing.assert_close(scores, method.scores(kept))
    one = config.model_copy(update={"model": config.model.model_copy(update={"modality": "audio"})})
    with pytest.raises(ConfigError, match="the step was trained on audio alone"):
        restore_step(replace(artifact, config=one), shape, "here", "audio")
