"""Snapshots on real ranks: a step that stopped goes on to the same bits, or says why it cannot."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import ConfigError, StepStopped
from avcil_dist.signals import StopRequest
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.stream import stream_url
from avcil_dist.training.observer import Observer
from avcil_dist.training.snapshot import snapshots_url
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import run_steps, weights_digest, write_config

STAGES = (0, 1, 2, 3)
STEP = 1
EVERY = {"snapshot": {"every_iterations": 4}}


class StopsAt(Observer):
    """Asks for a stop after so many batches, on one rank alone; the ranks' vote does the rest."""

    def __init__(self, stop: StopRequest, count: int) -> None:
        self.stop, self.count = stop, count
        self.started_from = 0
        self.notes: list[str] = []

    def message(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        self.started_from = num_done

    def advance(self) -> None:
        self.count -= 1
        if self.count == 0:
            self.stop.set()


def stopped_step(world: World, config: Config, count: int) -> str:
    """Run the step until its last rank asks for a stop; why it stopped."""
    stop = StopRequest()
    observer = StopsAt(stop, count if world.rank == world.size - 1 else 0)
    with pytest.raises(StepStopped) as stopped:
        step_in_group(config, STEP, world=world, observers=[observer], device=CPU, stop=stop)
    return str(stopped.value)


def resumed_step(world: World, config: Config, *, reset_optimizer: bool = False) -> int:
    """Run the step to its end; from which iteration. What the teacher said is at hand: it is not asked again."""
    observer = StopsAt(StopRequest(), 0)
    step_in_group(
        config, STEP, world=world, observers=[observer], device=CPU, stop=observer.stop, reset_optimizer=reset_optimizer
    )
    assert not [note for note in observer.notes if "teacher" in note]
    return observer.started_from


def broken_and_whole(world: World, configs: Mapping[str, Config]) -> list[int]:
    """Each stream's two steps, the second stopped twice; where the last run began."""
    begun = []
    for name, config in configs.items():
        run_steps(world, config, [0])
        if name.startswith("whole"):
            run_steps(world, config, [STEP])
            continue
        stopped_step(world, config, 9)
        stopped_step(world, config, 6)
        begun.append(resumed_step(world, config))
    return begun


def resolved(config: Path, *words: str) -> Config:
    return load_config(str(config), words)


def test_a_step_that_stopped_ends_in_the_bits_of_one_that_did_not_at_every_zero_stage(tmp_path: Path) -> None:
    file = write_config(tmp_path, **EVERY)
    configs = {
        f"{kind}-{stage}": resolved(file, f"output={tmp_path}/{kind}-{stage}", f"engine=zero{stage}")
        for stage in STAGES
        for kind in ("whole", "broken")
    }
    for begun in run_ranks(broken_and_whole, 2, configs):
        assert begun == [10 + 7] * len(STAGES)  # asked for after 9 and 6 batches, voted on after the next
    for stage in STAGES:
        whole, broken = (stream_url(configs[f"{kind}-{stage}"]) for kind in ("whole", "broken"))
        assert weights_digest(broken, STEP) == weights_digest(whole, STEP)
        ours, theirs = load_artifact(broken, STEP), load_artifact(whole, STEP)
        assert (ours.metrics, ours.memory) == (theirs.metrics, theirs.memory)
        assert storage.list_folder(broken) == storage.list_folder(whole)  # no snapshot is left behind


def stop_first(world: World, configs: list[Config]) -> None:
    for config in configs:
        run_steps(world, config, [0])
        stopped_step(world, config, 9)


def go_on_elsewhere(world: World, plain: Config, sharded: Config) -> tuple[int, str, int]:
    begun = resumed_step(world, plain)
    with pytest.raises(ConfigError) as refused:
        resumed_step(world, sharded)
    return begun, str(refused.value), resumed_step(world, sharded, reset_optimizer=True)


def test_on_another_number_of_ranks_a_snapshot_goes_on_exactly_or_says_what_to_do(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    whole, plain, sharded = (
        resolved(file, f"output={tmp_path}/{name}", f"engine={engine}")
        for name, engine in (("whole", "zero0"), ("plain", "zero0"), ("sharded", "zero2"))
    )
    run_ranks(stop_first, 2, [plain, sharded])
    [(begun, refused, begun_again)] = run_ranks(go_on_elsewhere, 1, plain, sharded)
    run_ranks(run_steps, 1, whole, [0, STEP])
    assert begun == begun_again == 10
    assert "2 processes at ZeRO stage 2" in refused
    assert "--reset-optimizer" in refused
    assert "--restart-step" in refused
    ours, theirs = load_artifact(stream_url(plain), STEP), load_artifact(stream_url(whole), STEP)
    for name, value in theirs.model.items():
        torch.testing.assert_close(ours.model[name], value, rtol=1e-5, atol=1e-5)


def stop_and_reset(world: World, config: Config) -> int:
    """A step that is stopped and continues with --reset-optimizer, as a requeued job does again and again."""
    run_steps(world, config, [0])
    stopped_step(world, config, 9)
    return resumed_step(world, config, reset_optimizer=True)


def test_reset_optimizer_keeps_the_state_of_a_snapshot_that_fits(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    whole, broken = (resolved(file, f"output={tmp_path}/{name}") for name in ("whole", "broken"))
    run_ranks(run_steps, 1, whole, [0, STEP])
    assert run_ranks(stop_and_reset, 1, broken) == [10]
    assert weights_digest(stream_url(broken), STEP) == weights_digest(stream_url(whole), STEP)


def stop_and_go_on(world: World, config: Config, damage: str) -> tuple[int, list[str]]:
    """Stop a step, damage its newest snapshot, go on; from where, and what was said."""
    if not storage.exists(stream_url(config)):
        run_steps(world, config, [0])
    stopped_step(world, config, 9)
    folder = Path(snapshots_url(config, STEP))
    newest = folder / sorted(path.name for path in folder.iterdir())[-1]
    file = newest / ("model.safetensors" if damage != "json" else "COMMITTED.json")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("avcil_dist").addHandler(handler)
    return resumed_step(world, config), said


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_snapshot_is_passed_over_for_the_one_before_with_a_warning(tmp_path: Path, damage: str) -> None:
    config = resolved(write_config(tmp_path, **EVERY))
    [(begun, said)] = run_ranks(stop_and_go_on, 1, config, damage)
    assert begun == 8
    assert any("model.safetensors: damaged" in text and "skipping" in text for text in said)


def test_a_snapshot_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    [refused] = run_ranks(snapshot_alone_tells, 1, resolved(file), resolved(file, "optim.lr=0.5"))
    assert "optim.lr=0.003, not 0.5" in refused
    assert "--restart-step" in refused


def snapshot_alone_tells(world: World, config: Config, other: Config) -> str:
    """The same at step 0, which has no step before it that could tell."""
    stop = StopRequest()
    with pytest.raises(StepStopped):
        step_in_group(config, 0, world=world, observers=[StopsAt(stop, 3)], device=CPU, stop=stop)
    with pytest.raises(ConfigError) as refused:
        step_in_group(other, 0, world=world, observers=(), device=CPU, stop=StopRequest())
    return str(refused.value)
