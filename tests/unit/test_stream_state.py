"""Streams on disk: the next step, the single writer, and whether a stream may continue."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.shard import SPLITS
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.streams import stream as stream_module
from avcil_dist.streams.artifact import save_artifact
from avcil_dist.streams.compat import check_continues, load_previous
from avcil_dist.streams.identity import Change, new_identity, write_identity
from avcil_dist.streams.stream import next_step, scenario_of, shards_of, sole_runner, sole_writer, stream_url
from avcil_dist.tracking.session import track_step
from tests.helpers.artifacts import make_artifact


def manifest(content_hash: str = "m") -> Any:
    return SimpleNamespace(content_hash=content_hash, classes=("dog", "cat", "bus"))


class ListedShards:
    """A manifest of three classes with one shard for each class and split."""

    classes = ("bus", "cat", "dog")

    def shard_numbers(self, classes: Sequence[str], split: str) -> list[int]:
        return [10 * self.classes.index(name) + SPLITS.index(split) for name in classes]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The configuration of a stream whose steps 0 and 1 are committed."""
    for step in range(2):
        artifact = make_artifact(step, str(tmp_path))
        save_artifact(stream_url(artifact.config), artifact)
    return artifact.config


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return Config.model_validate(config.model_dump() | {k: config.model_dump()[k] | v for k, v in sections.items()})


def test_the_next_step_follows_the_last_committed_one(config: Config, tmp_path: Path) -> None:
    stream = stream_url(config)
    assert next_step(str(tmp_path / "nothing"), 4) == 0
    assert next_step(stream, 4) == 2
    assert next_step(stream, 2) == 2
    storage.remove_tree(f"{stream}/step_000")  # as after resuming on another machine
    assert next_step(stream, 4) == 2


def test_a_stream_continues_with_the_settings_and_data_that_it_was_made_with(config: Config) -> None:
    check_continues(config, manifest(), 2)
    check_continues(changed(config, data={"read_threads": 3}, snapshot={"every_minutes": 99}), manifest(), 2)
    assert load_previous(config, manifest(), 0) is None
    previous = load_previous(config, manifest(), 2)
    assert previous is not None
    assert previous.step == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"lr": 0.5}}, r"step 1 was made with optim\.lr=.*, not 0\.5; choose another name="),
        ({"engine": {"precision": "bf16"}}, r"engine\.precision=.*, not bf16"),
        ({"scenario": {"classes_per_step": [1, 2]}}, r"scenario\.classes_per_step=\[2, 1\], not \[1, 2\]"),
    ],
)
def test_other_settings_do_not_continue_a_stream(config: Config, sections: Any, message: str) -> None:
    for check in (check_continues, load_previous):
        with pytest.raises(ConfigError, match=message):
            check(changed(config, **sections), manifest(), 2)


def test_other_data_does_not_continue_a_stream(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"step 1 was made from other data than manifest\.json"):
        check_continues(config, manifest("other"), 2)


def test_a_recorded_change_continues_the_stream_after_its_step_only(config: Config) -> None:
    lr, after = config.optim.lr, changed(config, optim={"lr": 0.5})
    identity = new_identity()
    for change, passes in (
        (Change(1, "optim.lr", lr, 0.5, forced=False), True),
        (Change(0, "optim.lr", lr, 0.5, forced=False), False),
        (Change(1, "optim.lr", lr, 0.6, forced=False), False),
    ):
        write_identity(stream_url(config), replace(identity, changes=(change,)))
        if passes:
            check_continues(after, manifest(), 2)
        else:
            with pytest.raises(ConfigError, match="optim"):
                check_continues(after, manifest(), 2)


def test_a_stream_without_the_previous_step_does_not_continue(config: Config) -> None:
    with pytest.raises(ArtifactError, match=r"step_002: no committed step artifact"):
        load_previous(config, manifest(), 3)


def test_a_stream_has_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "LOCK_SECONDS", 0.1)
    stream = str(tmp_path / "runs" / "tiny")
    with sole_writer(stream):
        with sole_writer(str(tmp_path / "runs" / "other")):
            pass
        with pytest.raises(ConfigError, match="another process trains this stream"), sole_writer(stream):
            pass
    with sole_writer(stream):  # free again
        assert not Path(stream).exists()  # the lock lies beside the folder, which may be removed


def test_a_wait_for_another_process_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.05)
    stream = str(tmp_path / "runs" / "tiny")
    with ThreadPoolExecutor(1) as pool:
        with sole_writer(stream):
            other = pool.submit(_take, stream)
            while not caplog.messages:
                time.sleep(0.01)
            assert not other.done()
        other.result()
    assert caplog.messages == [f"{stream}: another process trains this stream; waiting for its end"]


def _take(stream: str) -> None:
    with sole_writer(stream):
        return


def test_a_command_that_runs_a_stream_leaves_its_steps_their_own_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "LOCK_SECONDS", 0.1)
    stream = str(tmp_path / "runs" / "tiny")
    with sole_runner(stream):
        with sole_writer(stream), sole_runner(str(tmp_path / "runs" / "other")):
            pass
        with pytest.raises(ConfigError, match="another process trains this stream"), sole_runner(stream):
            pass


def test_the_locks_of_a_stream_are_files_beside_it_and_its_folder_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "runs"
    with sole_writer(str(folder / "tiny")), sole_runner(str(folder / "tiny")):
        assert sorted(path.name for path in folder.iterdir()) == [".tiny.lock", ".tiny.run.lock"]


def test_a_stream_on_object_storage_has_no_lock() -> None:
    with sole_writer("memory://runs/tiny"), sole_writer("memory://runs/tiny"):
        pass


def test_the_scenario_has_the_classes_sizes_and_order_of_the_configuration(config: Config) -> None:
    listed: Any = ListedShards()
    scenario = scenario_of(changed(config, scenario={"classes": ["dog", "bus", "cat"], "shuffle_seed": None}), listed)
    assert scenario.steps == (("dog", "bus"), ("cat",))
    orders = {
        scenario_of(changed(config, scenario={"shuffle_seed": seed}), listed).classes for seed in (None, *range(9))
    }
    assert len(orders) > 2
    assert {frozenset(order) for order in orders} == {frozenset(listed.classes)}


def test_a_step_may_read_the_shards_of_all_seen_classes_and_splits(config: Config) -> None:
    listed: Any = ListedShards()
    scenario = scenario_of(changed(config, scenario={"classes": ["dog", "bus", "cat"], "shuffle_seed": None}), listed)
    assert sorted(shards_of(listed, scenario, 0)) == [0, 1, 2, 20, 21, 22]
    assert sorted(shards_of(listed, scenario, 1)) == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_a_folder_that_is_removed_while_its_stream_is_trained_is_one_line(tmp_path: Path) -> None:
    config = load_config("demo", [f"output={tmp_path}/runs"])
    with (
        pytest.raises(ArtifactError, match="demo-avcil-seed0: its folder was removed meanwhile"),
        track_step(config, 0),
    ):
        pass
    assert not (tmp_path / "runs").exists()
