"""Snapshots on real ranks: a stopped step continues to the same bits, or is refused with a reason."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import ConfigError, StepStopped
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.snapshots import snapshots_url
from avcil_dist.streams.stream import stream_url
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import run_steps, weights_digest, write_config

STAGES = (0, 1, 2, 3)
STEP = 1
EVERY = {"snapshot": {"every_iterations": 4}}


class StopsAt(Observer):
    """Requests a stop after some batches, on one rank alone; the vote stops all ranks."""

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
    """Run the step until its last rank requests a stop; returns the message."""
    stop = StopRequest()
    observer = StopsAt(stop, count if world.rank == world.size - 1 else 0)
    with pytest.raises(StepStopped) as stopped:
        step_in_group(config, STEP, world=world, observers=[observer], device=CPU, stop=stop)
    return str(stopped.value)


def resumed_step(world: World, config: Config) -> int:
    """Run the step to its end; returns the iteration that it continues from. The teacher cache is loaded."""
    observer = StopsAt(StopRequest(), 0)
    step_in_group(config, STEP, world=world, observers=[observer], device=CPU, stop=observer.stop)
    assert not [note for note in observer.notes if "teacher" in note]
    return observer.started_from


def broken_and_whole(world: World, configs: Mapping[str, Config]) -> list[int]:
    """Run two steps of each stream, the second stopped twice; returns the iterations that the last runs began at."""
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
    variants = {f"zero{stage}": [f"engine=zero{stage}"] for stage in STAGES}
    # its exemplars have stored logits, clips have weights, and each rank has a share of the average
    variants["foreign"] = ["method=tests.helpers.foreign_methods:BalancedReplay", "optim.ema=0.9"]
    configs = {
        f"{kind}-{name}": resolved(file, f"output={tmp_path}/{kind}-{name}", *words)
        for name, words in variants.items()
        for kind in ("whole", "broken")
    }
    for begun in run_ranks(broken_and_whole, 2, configs):
        assert begun == [10 + 7] * len(variants)  # requested after 9 and 6 batches, voted on after the next
    for name in variants:
        whole, broken = (stream_url(configs[f"{kind}-{name}"]) for kind in ("whole", "broken"))
        assert weights_digest(broken, STEP) == weights_digest(whole, STEP)
        ours, theirs = load_artifact(broken, STEP), load_artifact(whole, STEP)
        assert (ours.metrics, ours.memory) == (theirs.metrics, theirs.memory)
        assert storage.list_folder(broken) == storage.list_folder(whole)  # no snapshot is left behind


def stop_damage_and_resume(world: World, config: Config, damage: str) -> tuple[int, list[str]]:
    """Stop a step, damage its newest snapshot, resume; returns the first iteration and the warnings."""
    if not storage.exists(stream_url(config)):
        run_steps(world, config, [0])
    stopped_step(world, config, 9)
    folder = Path(snapshots_url(config, STEP))
    newest = folder / sorted(path.name for path in folder.iterdir())[-1]
    file = newest / ("model_000.safetensors" if damage != "json" else "COMMITTED.json")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("avcil_dist").addHandler(handler)
    return resumed_step(world, config), messages


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_snapshot_is_skipped_for_the_previous_one_with_a_warning(tmp_path: Path, damage: str) -> None:
    config = resolved(write_config(tmp_path, **EVERY))
    [(begun, messages)] = run_ranks(stop_damage_and_resume, 1, config, damage)
    assert begun == 8
    assert any("model_000.safetensors: damaged" in text and "skipping" in text for text in messages)


def test_a_snapshot_is_refused_with_other_settings(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    [refused] = run_ranks(refused_at_step_0, 1, resolved(file), resolved(file, "optim.lr=0.5"))
    assert "optim.lr=0.003, not 0.5" in refused
    assert "--restart-step" in refused


def refused_at_step_0(world: World, config: Config, other: Config) -> str:
    """Stop and resume step 0, which has no previous step with settings to compare."""
    stop = StopRequest()
    with pytest.raises(StepStopped):
        step_in_group(config, 0, world=world, observers=[StopsAt(stop, 3)], device=CPU, stop=stop)
    with pytest.raises(ConfigError) as refused:
        step_in_group(other, 0, world=world, observers=(), device=CPU, stop=StopRequest())
    return str(refused.value)
