"""Long-tailed and blurry streams: the training clips that each step has."""

from pathlib import Path

import numpy as np
import pytest

from avcil_dist.compose import load_config
from avcil_dist.config.schema import ScenarioConfig
from avcil_dist.data.arrival import arrived, late_clips, num_kept, shares
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.errors import ConfigError
from avcil_dist.scenario import Scenario
from avcil_dist.training.preflight import preflight
from data_shards.random_features import make_feature_shards
from tests.helpers.streams import write_config

SCENARIO = Scenario((("class_003", "class_000"), ("class_001",), ("class_004", "class_002")))
PER_CLASS = 20


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    clips = {"train": PER_CLASS, "val": 2, "test": 3}
    return load_manifest(make_feature_shards(tmp_path_factory.mktemp("arrival"), classes=5, clips=clips))


def settings(**changes: object) -> ScenarioConfig:
    return ScenarioConfig.model_validate({"classes_per_step": 2} | changes)


def keys(manifest: Manifest, clips: np.ndarray) -> list[str]:
    return [manifest.key(int(clip)) for clip in clips]


def keys_by_step(manifest: Manifest, changes: ScenarioConfig) -> list[list[str]]:
    """Keys of the training clips that arrive at each step, in the numbers of that step's part."""
    found = []
    for step in range(SCENARIO.num_steps):
        part = arrived(manifest, SCENARIO, changes, step)
        late = late_clips(part, SCENARIO, changes, step)
        found.append(keys(part, np.concatenate([part.clips(SCENARIO.new(step), "train"), late])))
    return found


def test_without_the_options_the_data_set_is_the_same() -> None:
    whole = Manifest("clip", (), (), {})
    assert arrived(whole, SCENARIO, settings(), 0) is whole
    assert len(late_clips(whole, SCENARIO, settings(), 1)) == 0


def test_each_clip_of_a_blurred_stream_arrives_once_and_a_share_of_it_one_step_late(manifest: Manifest) -> None:
    by_step = keys_by_step(manifest, settings(blur=0.3))
    everything = [key for step in by_step for key in step]
    assert sorted(everything) == sorted(keys(manifest, manifest.clips(SCENARIO.classes, "train")))
    assert [len(step) for step in by_step] == [2 * 14, 14 + 2 * 6, 2 * 20 + 6]
    late = {key.split("-")[1] for key in by_step[1]} - {"001"}
    assert late == {"003", "000"}
    assert keys_by_step(manifest, settings(blur=0.3)) == by_step
    assert keys_by_step(manifest, settings(blur=0.3, stream_seed=1)) != by_step


def test_a_long_tail_has_an_exponential_profile_over_classes_in_random_order(manifest: Manifest) -> None:
    options = settings(imbalance=16)
    part = arrived(manifest, SCENARIO, options, 0)
    counts = sorted(len(part.clips([name], "train")) for name in SCENARIO.classes)
    assert counts == [round(PER_CLASS * share) or 1 for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)]
    order = list(shares(SCENARIO, options).values())
    assert order != sorted(order)
    others = {tuple(shares(SCENARIO, settings(imbalance=16, stream_seed=seed)).values()) for seed in range(5)}
    assert len(others) > 1
    assert shares(Scenario((("a",),)), options) == {"a": 1.0}
    assert num_kept(3, 1e-9) == 1


def test_both_together_blur_the_clips_that_are_kept(manifest: Manifest) -> None:
    options = settings(imbalance=4, blur=0.9)
    everything = sorted(key for step in keys_by_step(manifest, options) for key in step)
    tailed = arrived(manifest, SCENARIO, settings(imbalance=4), 0)
    assert everything == sorted(keys(tailed, tailed.clips(SCENARIO.classes, "train")))
    assert all(keys_by_step(manifest, options))


def test_other_splits_offsets_and_the_content_hash_stay(manifest: Manifest) -> None:
    part = arrived(manifest, SCENARIO, settings(imbalance=5, blur=0.5), 1)
    assert part.content_hash == manifest.content_hash
    for split in ("val", "test"):
        assert keys(part, part.clips(manifest.classes, split)) == keys(
            manifest, manifest.clips(manifest.classes, split)
        )
    whole = {
        manifest.key(clip): manifest.spans("audio.npy", np.array([clip])) for clip in range(manifest.first_clips[-1])
    }
    for clip in range(part.first_clips[-1]):
        assert part.spans("audio.npy", np.array([clip])) == whole[part.key(clip)]


def test_methods_that_need_whole_classes_refuse_a_blurred_stream_and_a_long_tail_needs_full_batches(
    tmp_path: Path,
) -> None:
    path = str(write_config(tmp_path))
    for method in ("avcil", "ssil", "lwf", "air"):
        with pytest.raises(ConfigError, match=rf"^scenario.blur=0.2: method {method} needs all training clips .* acil"):
            preflight(load_config(path, [f"method={method}", "scenario.blur=0.2"]), [1], restart=True)
        preflight(load_config(path, [f"method={method}", "scenario.imbalance=2"]), [1], restart=True)
    with pytest.raises(ConfigError, match=r"optim\.global_batch=12: step \d has only \d+ training clips"):
        preflight(load_config(path, ["method=er", "scenario.imbalance=50"]), [1], restart=True)
    tailed = ["method=kernel", "method.max_clips=100", "method.landmarks=0", "scenario.imbalance=3"]
    preflight(load_config(path, tailed), [1], restart=True)  # 144 clips without the long tail
