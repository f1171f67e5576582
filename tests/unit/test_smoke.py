"""Smoke runs: the configuration of one, the clips that it takes, and the error of data that are not there."""

from pathlib import Path

import numpy as np
import pytest

from avcil_dist.compose import load_config
from avcil_dist.config.compat import result_changes
from avcil_dist.config.loader import shipped_configs
from avcil_dist.config.schema import LimitConfig
from avcil_dist.config.serialization import flatten
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import SPLITS, Shard
from avcil_dist.data.subset import limited, load_data
from avcil_dist.errors import DataError
from launch.smoke import clips_per_class, smoke_config

CLASSES = ("a", "b", "c")
COUNTS = {"train": (30, 7, 12), "val": (4, 4, 4), "test": (5, 5, 5)}


def _manifest(root: str = ".") -> Manifest:
    """Two shards for each class and split, of whatever bytes."""
    shards = []
    for split in SPLITS:
        for name, count in zip(CLASSES, COUNTS[split], strict=True):
            for part, rows in enumerate((count // 2, count - count // 2)):
                keys = tuple(f"{split}-{name}-{part}-{row}" for row in range(rows))
                spans = {
                    member: np.arange(1, rows + 1, dtype=np.int64) * 1024 for member in ("visual.npy", "audio.npy")
                }
                sha256 = f"{len(shards):064x}"
                url = f"{split}/{name}-{part}.tar"
                sizes, regions = {m: s // s for m, s in spans.items()}, (None,) * rows
                shards.append(Shard.of(url, name, split, 1 << 20, sha256, keys, spans, sizes, regions=regions))
    return Manifest("feature", CLASSES, tuple(shards), {"frames": 1, "positions": 2, "dim": 3}, root)


def test_a_subset_has_the_first_clips_of_each_class_and_split() -> None:
    manifest = _manifest()
    subset = limited(manifest, LimitConfig(train=10, val=1))
    counts = {split: [len(subset.clips([name], split)) for name in CLASSES] for split in SPLITS}
    assert counts == {"train": [10, 7, 10], "val": [1, 1, 1], "test": [5, 5, 5]}
    whole = [manifest.key(int(clip)) for clip in manifest.clips(["c"], "train")]
    assert [subset.key(int(clip)) for clip in subset.clips(["c"], "train")] == whole[:10]
    assert subset.content_hash != manifest.content_hash
    rows = [shard.count for shard in subset.shards]
    assert [len(shard.regions or ()) for shard in subset.shards] == rows
    assert limited(manifest, LimitConfig()) is manifest
    assert limited(manifest, LimitConfig(train=1000)).content_hash == manifest.content_hash


@pytest.mark.parametrize(
    ("counts", "total", "limit"),
    [([30, 7, 12], 32, 13), ([5, 5], 10, 5), ([5, 5], 100, 5), ([100, 1], 8, 7), ([], 4, 1), ([4, 4, 4], 2, 1)],
)
def test_the_limit_is_the_smallest_that_has_enough_clips(counts: list[int], total: int, limit: int) -> None:
    assert clips_per_class(counts, total) == limit


def test_a_smoke_run_has_two_iterations_of_each_step_in_a_folder_of_its_own(tmp_path: Path) -> None:
    _manifest().save(f"{tmp_path}/manifest.json")
    words = [f"data.manifest={tmp_path}/manifest.json", "scenario.classes_per_step=[2,1]", "optim.patience=5"]
    config = load_config("ave_ci", [*words, "optim.global_batch=6", "optim.global_eval_batch=3"])
    smoke = smoke_config(config)
    assert smoke.data.limit == LimitConfig(train=12, val=2, test=2)
    assert smoke.output == "runs/smoke"
    assert smoke.stream_name == config.stream_name
    assert (smoke.tracking.experiment, smoke.tracking.register_as) == ("avcil-smoke", "none")
    changed = {change.key for change in result_changes(flatten(config), flatten(smoke))}
    limits = {f"data.limit.{split}" for split in SPLITS}
    assert changed == limits | {"optim.epochs", "optim.patience"}


def test_the_settings_of_a_smoke_run_are_valid_for_every_benchmark(tmp_path: Path) -> None:
    _manifest().save(f"{tmp_path}/manifest.json")
    words = [f"data.manifest={tmp_path}/manifest.json", "scenario.classes_per_step=1"]
    schedule = ["optim.schedule=multistep", "optim.milestones=[3]", "optim.warmup_epochs=2", "optim.validate_every=4"]
    for more in ([], schedule, ["method=joint"], ["method=analytic"]):
        smoke = smoke_config(load_config("demo", [*words, *more]))
        assert type(smoke).model_validate(smoke.model_dump()) == smoke


def test_missing_data_of_a_benchmark_are_a_line_with_their_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    benchmarks = sorted((shipped_configs() / "benchmark").glob("*.yaml"))
    assert len(benchmarks) >= 6
    for path in benchmarks:
        config = load_config(path.stem)
        with pytest.raises(
            DataError, match=r"missing; the data of this benchmark are made by: (avcil |the commands of docs/)"
        ) as caught:
            load_data(config.data)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match=r"runs/x\.json: missing$"):
        load_data(load_config("demo", ["data.manifest=runs/x.json", "data.made_by=null"]).data)
