"""Clips of one source video, and the test on those that share none with training clips."""

import json
from pathlib import Path

import numpy as np
import pytest

from avcil_dist.compose import load_config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.source_videos import source_disjoint, source_of
from data_shards.random_features import make_feature_shards
from tests.helpers.ranks import run_ranks
from tests.helpers.streams import run_streams, write_config


def key_of(split: str, number: int, row: int) -> str:
    """Even test clips are cut from a training clip's video, at another second."""
    if split == "test" and row % 2 == 0:
        return f"a_b{number}-{row}_{100 + row:06d}"
    return f"{'a_b' if split == 'train' else split}{number}-{row}_000001"


def test_source_video_is_the_text_before_the_last_underscore() -> None:
    assert source_of("X5p1pQzHKE0_000145") == "X5p1pQzHKE0"
    assert source_of("a_b_c_000030") == "a_b_c"
    assert source_of("nothing") == "nothing"


def test_clips_that_share_a_video_with_a_training_clip_are_masked(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path, classes=2, clips={"train": 6, "test": 4}, key=key_of))
    clips = manifest.clips(["class_000", "class_001"], "test")
    assert source_disjoint(manifest, ["class_000", "class_001"], clips).tolist() == [False, True, False, True] * 2
    assert source_disjoint(manifest, ["class_001"], clips).tolist() == [True] * 4 + [False, True] * 2
    assert source_disjoint(manifest, ["class_000"], clips[:0]).tolist() == []


@pytest.mark.slow
def test_a_stream_reports_both_accuracies_and_its_confusions(tmp_path: Path) -> None:
    clips = {"train": 24, "val": 6, "test": 10}
    make_feature_shards(tmp_path / "shards", classes=6, clips=clips, key=key_of, separation=0.4)
    config = load_config(str(write_config(tmp_path)), ["method=analytic", "data.source_disjoint=true"])
    [[stream]] = run_ranks(run_streams, 1, [config])
    record = json.loads(Path(stream, "step_002", "metrics.json").read_text())

    disjoint = record["source_disjoint"]
    assert disjoint["num_test_clips"] == 30
    assert record["num_test_clips"] == 60
    assert len(disjoint["seen_accuracy"]) == 3
    assert disjoint["mean_accuracy"] == np.mean(disjoint["seen_accuracy"])

    confusion = record["confusion"]
    assert {name: sum(row.values()) for name, row in confusion.items()} == {f"class_{n:03d}": 10 for n in range(6)}
    right = {name: row.get(name, 0) / 10 for name, row in confusion.items()}
    assert right == record["per_class"]
    assert sum(right.values()) / 6 == record["seen_accuracy"][-1]
    assert 0.3 < record["seen_accuracy"][-1] < 1  # some clips are confused
