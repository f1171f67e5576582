"""Training loop on one rank: metrics of an epoch, the best epoch, and what a snapshot preserves of both."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError, StepStopped
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from avcil_dist.streams.metrics import EpochChoice
from avcil_dist.streams.snapshots import snapshots_url
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import step_url
from avcil_dist.system.signals import StopRequest
from avcil_dist.training import engine, trainer
from avcil_dist.training.engine import Engine
from avcil_dist.training.evaluation import Predictions
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import step_in_group
from avcil_dist.training.train_step import StepLosses, train_step
from avcil_dist.training.weights import whole_state
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.features import damage
from tests.helpers.streams import weights_digest, write_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]  # DeepSpeed starts a compiler as it is imported

CPU = torch.device("cpu")
PER_EPOCH, EPOCHS = 6, 4  # 72 clips of 3 classes, 12 a batch


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return resolve(tmp_path)


def resolve(folder: Path, *words: str) -> Config:
    return load_config(
        str(write_config(folder)), ["scenario.classes_per_step=3", f"optim.epochs={EPOCHS}", "memory.size=12", *words]
    )


class Recorder(Observer):
    """Everything that a step reports; requests a stop after `count` batches."""

    def __init__(self, count: int = 0) -> None:
        self.count, self.stop = count, StopRequest()
        self.started_from = -1
        self.epochs: list[dict[str, float]] = []
        self.messages: list[str] = []

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        self.started_from = num_done

    def advance(self) -> None:
        self.count -= 1
        if self.count == 0:
            self.stop.set()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        self.epochs.append(dict(values))


def run(config: Config, number: int = 0, *observers: Observer, **options: Any) -> Recorder:
    """Run a step to its end."""
    recorder = Recorder()
    step_in_group(
        config,
        number,
        world=World(),
        observers=[recorder, *observers],
        device=CPU,
        stop=recorder.stop,
        **options,
    )
    return recorder


def stop_after(config: Config, count: int, number: int = 0) -> Recorder:
    """Run a step until it stops with a snapshot, one batch after `count`."""
    recorder = Recorder(count)
    with pytest.raises(StepStopped):
        step_in_group(config, number, world=World(), observers=[recorder], device=CPU, stop=recorder.stop)
    return recorder


def accuracies(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Let the validations of the following epochs have these accuracies."""
    coming = iter(values)

    def evaluate(*_: Any) -> Predictions:
        right = round(10 * next(coming))
        clips, labels = np.arange(10), np.zeros(10, dtype=np.int64)
        return Predictions(clips, labels, np.where(clips < right, 0, 1))

    monkeypatch.setattr(trainer, "evaluate", evaluate)


def kept_line(recorder: Recorder) -> str:
    """The line about the epoch that the step keeps."""
    [line] = [text for text in recorder.messages if "keeps epoch" in text]
    return line


def artifact_of(config: Config, number: int = 0) -> StepArtifact:
    return load_artifact(stream_url(config), number)


def test_the_loss_of_an_epoch_is_the_mean_of_its_iterations(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []

    def recorded(*arguments: Any, **options: Any) -> StepLosses:
        done = train_step(*arguments, **options)
        losses.append(done.parts["loss"].item())
        return done

    monkeypatch.setattr(trainer, "train_step", recorded)
    reported = run(config).epochs
    assert len(losses) == PER_EPOCH * EPOCHS
    for epoch, values in enumerate(reported):
        mean = np.mean(losses[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH])
        assert values["loss/total"] == pytest.approx(mean, rel=1e-6)


def test_losses_are_checked_in_groups_and_at_the_end_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(tmp_path, f"tracking.every={PER_EPOCH}")  # a report checks them, too
    sizes: list[int] = []
    check = trainer.Trainer._check_losses

    def recorded(own: trainer.Trainer, *rest: Any) -> None:
        sizes.append(len(own._unchecked))
        check(own, *rest)

    monkeypatch.setattr(trainer, "ITERATIONS_PER_CHECK", 4)
    monkeypatch.setattr(trainer.Trainer, "_check_losses", recorded)
    run(config)
    assert sizes == [4, 2] * EPOCHS


def test_the_first_of_equally_good_epochs_is_the_result(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies(monkeypatch, [0.5, 0.9, 0.9, 0.7])
    line = kept_line(run(config))
    assert line == "step 0: keeps epoch 2/4, val 90.0%; 1 later one is as good, the first is kept"
    assert (artifact_of(config).metrics.epoch, artifact_of(config).metrics.val_accuracy) == (1, 0.9)
    assert artifact_of(config).metrics.choices == (EpochChoice(1, 4, 0.9, num_ties=1),)


def test_a_step_that_stopped_after_its_best_epoch_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = resolve(tmp_path, f"output={tmp_path}/whole"), resolve(tmp_path, f"output={tmp_path}/broken")
    accuracies(monkeypatch, [0.9, 0.5, 0.6, 0.7])
    run(whole)
    accuracies(monkeypatch, [0.9, 0.5])
    stop_after(broken, 2 * PER_EPOCH + 2)
    accuracies(monkeypatch, [0.6, 0.7])
    assert run(broken).started_from == 2 * PER_EPOCH + 3
    assert (artifact_of(broken).metrics.epoch, artifact_of(broken).metrics.val_accuracy) == (0, 0.9)
    assert weights_digest(stream_url(broken), 0) == weights_digest(stream_url(whole), 0)


def test_the_network_before_training_is_a_candidate_where_a_method_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(tmp_path, "method=anchored")
    accuracies(monkeypatch, [0.5, 0.4, 0.5, 0.4, 0.3])
    stop_after(config, 2 * PER_EPOCH + 3)
    recorder = run(config)
    assert kept_line(recorder) == "step 0: keeps epoch 0/4, val 50.0%; 1 later one is as good, the first is kept"
    artifact = artifact_of(config)
    assert artifact.metrics.epoch == -1
    assert not artifact.model["classifier.weight"].any()
    torch.testing.assert_close(artifact.model["anchor.weights"], (10 * artifact.method["weights"]).float())


def test_ties_are_counted_over_a_stop(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies(monkeypatch, [0.9, 0.9])
    stop_after(config, 2 * PER_EPOCH + 2)
    accuracies(monkeypatch, [0.9, 0.7])
    assert "keeps epoch 1/4, val 90.0%; 2 later ones are as good" in kept_line(run(config))


def test_a_step_ends_after_as_many_validations_without_a_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = resolve(tmp_path, "optim.patience=2", "optim.epochs=9")
    accuracies(monkeypatch, [0.5, 0.6, 0.6, 0.5])
    found = run(patient)
    assert len(found.epochs) == 4
    line = "keeps epoch 2/4, val 60.0%; 1 later one is as good, the first is kept; ended early, of 9 epochs"
    assert line in kept_line(found)
    assert artifact_of(patient).metrics.choices == (EpochChoice(1, 4, 0.6, num_ties=1),)
    assert artifact_of(patient).metrics.epoch == 1

    broken = resolve(tmp_path, "optim.patience=2", "optim.epochs=9", f"output={tmp_path}/broken")
    accuracies(monkeypatch, [0.5, 0.6, 0.6])
    stop_after(broken, 3 * PER_EPOCH + 1)
    accuracies(monkeypatch, [0.5])
    assert len(run(broken).epochs) == 1
    assert weights_digest(stream_url(broken), 0) == weights_digest(stream_url(patient), 0)


def test_epochs_are_validated_at_an_interval_and_the_last_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(tmp_path, "optim.validate_every=2", "optim.epochs=5", "optim.patience=2")
    accuracies(monkeypatch, [0.9, 0.8, 0.95])
    found = run(config)
    assert ["val/accuracy" in values for values in found.epochs] == [False, True, False, True, True]
    assert artifact_of(config).metrics.epoch == 4


SCHEDULED = ("optim.name=sgd", "optim.schedule=cosine", "optim.warmup_epochs=0.5", "optim.ema=0.9", "optim.lr=0.05")


def test_schedule_and_average_continue_from_a_snapshot_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = (resolve(tmp_path, f"output={tmp_path}/{name}", *SCHEDULED) for name in ("whole", "broken"))
    rates = [values["optim/learning_rate"] for values in run(whole).epochs]
    stop_after(broken, PER_EPOCH + 2)
    rest = run(broken)
    assert rest.started_from == PER_EPOCH + 3
    assert weights_digest(stream_url(broken), 0) == weights_digest(stream_url(whole), 0)
    assert rates == sorted(rates, reverse=True)
    assert [values["optim/learning_rate"] for values in rest.epochs] == rates[1:]


def test_the_average_of_the_weights_is_validated_and_kept(tmp_path: Path) -> None:
    """Recomputed from the weights after each iteration of the same training without an average."""
    words = ("optim.epochs=1", "optim.keep_epoch=last")
    weights: list[dict[str, torch.Tensor]] = []

    class Weights(Observer):
        def advance(self) -> None:
            if engines and len(weights) < PER_EPOCH:
                weights.append({name: value.double() for name, value in whole_state(engines[0].network).items()})

    engines: list[Engine] = []
    make = trainer.Trainer._make_engine

    def recorded(own: trainer.Trainer, student: Any) -> Engine:
        engines.append(make(own, student))
        weights.append({name: value.double() for name, value in whole_state(engines[0].network).items()})
        return engines[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_make_engine", recorded)
        run(resolve(tmp_path, *words, f"output={tmp_path}/plain"), 0, Weights())
        last = {name: value.double() for name, value in whole_state(engines[0].network).items()}
    averaged = resolve(tmp_path, *words, "optim.ema=0.5", f"output={tmp_path}/averaged")
    run(averaged)
    kept = artifact_of(averaged).model
    for name, expected in weights[0].items():
        for count, after in enumerate([*weights[1:PER_EPOCH], last], start=1):
            decay = min(0.5, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * after[name]
        torch.testing.assert_close(kept[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_a_step_that_stopped_within_an_epoch_reports_the_whole_of_it(tmp_path: Path) -> None:
    words = "data.max_bad_fraction=0.2", "data.clip_cache=none"
    whole, broken = (resolve(tmp_path, f"output={tmp_path}/{name}", *words) for name in ("whole", "broken"))
    for row in range(3):
        damage(tmp_path / "shards", f"train-001-{row:05d}")
    reported = (recorder := run(whole)).epochs
    assert sum("3 damaged clips are skipped" in text for text in recorder.messages) == 1  # they are in every epoch
    first, rest = stop_after(broken, PER_EPOCH + 2), run(broken).epochs
    assert (len(first.epochs), len(rest)) == (1, EPOCHS - 1)
    broken_epochs = [*first.epochs, *rest]
    for found, expected in zip(broken_epochs, reported, strict=True):
        assert found["data/damaged_clips"] == expected["data/damaged_clips"] == 3
        assert found["loss/total"] == expected["loss/total"]
        assert found["val/accuracy"] == expected["val/accuracy"]
    read, planned = (sum(values["data/read_bytes"] for values in epochs) for epochs in (broken_epochs, reported))
    assert read >= planned  # batches that were read ahead as the step stopped are read again
    committed = artifact_of(broken)
    assert committed.metrics.epochs == artifact_of(whole).metrics.epochs
    assert [epoch.loss for epoch in committed.metrics.epochs] == [values["loss/total"] for values in reported]
    assert committed.metrics.epochs[1].val_accuracy == reported[1]["val/accuracy"]
    assert (committed.ranks, committed.seconds > 0) == (1, True)


def test_a_counter_is_reported_from_its_first_value_that_is_not_zero(tmp_path: Path) -> None:
    reported = run(resolve(tmp_path, "data.clip_cache=host")).epochs
    assert reported[0]["data/read_bytes"] > 0
    assert reported[0]["data/stall_seconds"] > 0  # the first batch is always waited for
    # Batches are read ahead: those at the end of an epoch may not be cached yet when the next one requests their clips.
    assert [values["data/read_bytes"] for values in reported[2:]] == [0] * (EPOCHS - 2)
    assert not [name for values in reported for name in values if "retries" in name or "damaged" in name]
    assert all(values.keys() == reported[0].keys() for values in reported)
    assert {name.split("/")[0] for name in reported[0]} == {"loss", "val", "data", "optim", "speed"}


def test_a_counter_from_before_a_stop_is_reported_after_it_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        count = trainer.Trainer._sum_over_ranks
        patch.setattr(
            trainer.Trainer, "_sum_over_ranks", lambda own, read: count(own, read) | {"retries": float(bool(read))}
        )
        [first] = stop_after(config, PER_EPOCH - 1).epochs
    assert first["data/retries"] == 1
    assert [values["data/retries"] for values in run(config).epochs] == [0] * (EPOCHS - 1)


def test_a_snapshot_of_other_data_is_skipped(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop_after(config, 9)
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": 24, "val": 6, "test": 10}, separation=0.7)
    with caplog.at_level(logging.WARNING):
        assert run(config).started_from == 0
    assert "of other data or of another previous step; skipping this snapshot" in caplog.text


def test_a_snapshot_with_other_settings_is_refused_and_a_setting_of_the_machine_may_change(
    config: Config, tmp_path: Path
) -> None:
    stop_after(config, 9)
    with pytest.raises(ConfigError, match=r"step 0 was begun with optim\.lr=0\.003, not 0\.5"):
        run(resolve(tmp_path, "optim.lr=0.5"))
    assert run(resolve(tmp_path, "data.read_threads=3")).started_from == 10


def test_a_snapshot_of_another_previous_step_is_skipped_and_so_is_its_teacher_cache(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(config)
    assert [text for text in stop_after(config, 9, 1).messages if "teacher cache" in text]
    storage.remove_tree(step_url(stream_url(config), 0))
    folder = tmp_path / "elsewhere"
    saved = stream_url(config)
    Path(saved, "snapshots").rename(folder)  # step 0 discards all that it finds
    other = resolve(tmp_path, "data.read_threads=3")  # another step 0: its config.yaml differs
    run(other)
    folder.rename(Path(saved, "snapshots"))
    with caplog.at_level(logging.WARNING):
        second = run(other, 1)
    assert second.started_from == 0
    assert [text for text in second.messages if "teacher cache" in text]
    assert "of another previous step; skipping" in caplog.text


def test_a_snapshot_that_a_kill_cut_off_is_not_one_of_the_two_that_are_kept(config: Config) -> None:
    stop_after(config, 9)
    folder = snapshots_url(config, 0)
    storage.write_bytes(storage.join(folder, "000000011/training.json"), b"{}")
    stop_after(config, 2)
    assert storage.list_folder(folder) == ["000000010", "000000013"]


def test_the_teacher_cache_is_loaded_when_the_step_continues(config: Config) -> None:
    run(config)
    stop_after(config, 9, 1)
    assert not [text for text in run(config, 1).messages if "teacher cache" in text]


class FailsAt(Observer):
    """Raises at the first batch."""

    def advance(self) -> None:
        raise ZeroDivisionError("a bug")


def test_the_engine_is_closed_when_training_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Engine] = []
    released: list[Any] = []
    close, release = Engine.close, engine.release

    def recorded(made: Engine) -> None:
        closed.append(made)
        close(made)

    monkeypatch.setattr(Engine, "close", recorded)
    monkeypatch.setattr(engine, "release", lambda inner: released.append(inner) or release(inner))
    with pytest.raises(ZeroDivisionError):
        run(config, 0, FailsAt())
    assert len(closed) == 1
    assert released == [closed[0]._engine]


def test_the_shards_of_the_step_or_of_the_stream_are_checked_before_it_trains(config: Config) -> None:
    manifest = load_manifest(config.data.manifest)
    last = next(number for number, shard in enumerate(manifest.shards) if shard.class_name == manifest.classes[-1])
    Path(manifest.url(last)).unlink()
    with pytest.raises(DataError, match=r"missing; restore the shards"):
        run(config, shard_check="stream")
    assert run(config).started_from == 0  # step 0 does not read it
