"""Changes of settings that `avcil resume` allows, without a server."""

from typing import Any

import pytest

from avcil_dist.compose import load_config
from avcil_dist.config.compat import MANIFEST_HASH
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import ConfigError
from avcil_dist.streams.identity import Change
from avcil_dist.tracking.resume import ResumeRequest, allowed_changes

INCOMPARABLE = (
    MANIFEST_HASH,
    "scenario.classes_per_step",
    "scenario.classes",
    "scenario.shuffle_seed",
    "model.modality",
    "model.visual.kind",
    "model.audio.kind",
    "method.name",
    "data.clip.frames",
    "data.source_disjoint",
)
FORK = (
    "seed",
    "optim.lr",
    "optim.epochs",
    "memory.size",
    "engine.precision",
    "engine.max_grad_norm",
    "method.attention",
)
OPERATIONAL = ("output", "data.manifest", "data.read_threads", "snapshot.every_minutes", "engine.zero_stage")


def settings() -> dict[str, Any]:
    return flatten(load_config("demo")) | {MANIFEST_HASH: "a"}


def changes(key: str, *, step: int = 1, committed: tuple[int, ...] = (0, 1), **options: bool) -> tuple[Change, ...]:
    before = settings()
    assert key in before
    return allowed_changes(before, before | {key: "new"}, step, ResumeRequest(**options), committed)


@pytest.mark.parametrize("key", INCOMPARABLE)
def test_a_change_that_makes_steps_incomparable_needs_force_and_is_recorded(key: str) -> None:
    for options in ({}, {"fork": True}):
        with pytest.raises(ConfigError, match=rf"{key}: .* -> new: .* not be comparable; .* --force"):
            changes(key, **options)
    assert changes(key, force=True) == (Change(1, key, settings()[key], "new", forced=True),)


@pytest.mark.parametrize("key", FORK)
def test_a_change_that_makes_another_stream_needs_a_fork_and_is_recorded(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .* -> new: that makes another stream; add --fork"):
        changes(key)
    assert changes(key, fork=True) == (Change(1, key, settings()[key], "new", forced=False),)


@pytest.mark.parametrize("key", OPERATIONAL)
def test_a_change_of_how_a_stream_runs_needs_nothing_and_is_not_recorded(key: str) -> None:
    assert changes(key) == ()
    assert changes(key, step=0) == ()  # step 1 is committed with the same results


def test_a_change_in_front_of_later_steps_needs_a_fork_even_when_forced() -> None:
    with pytest.raises(ConfigError, match=r"step 1 is in this run already, made with the old settings; add --fork"):
        changes("optim.lr", step=0, committed=(0, 1, 2), force=True)
    assert len(changes("optim.lr", step=0, committed=(0, 1, 2), fork=True)) == 1
    assert len(changes("optim.lr", step=2, committed=(0, 1, 2), force=True)) == 1


def test_a_new_name_is_recorded_last_and_needs_no_flag_of_its_own() -> None:
    before = settings()
    after = before | {"name": "other", "optim.lr": 0.5, "seed": 9}
    recorded = allowed_changes(before, after, 0, ResumeRequest(fork=True), (0, 1))
    assert [change.key for change in recorded] == ["optim.lr", "seed", "name"]
    assert [change.key for change in allowed_changes(before, before | {"name": "x"}, 0, ResumeRequest(), (0, 1))] == [
        "name"
    ]
