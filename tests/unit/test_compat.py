"""Classes of change: every setting has one, and two configurations are compared by them."""

import pytest

from avcil_dist.compose import load_config
from avcil_dist.config.compat import (
    MANIFEST_HASH,
    change_class,
    result_changes,
    result_settings,
    setting_changes,
)
from avcil_dist.config.fields import method_fields, schema_fields
from avcil_dist.config.loader import shipped_configs
from avcil_dist.config.method_options import METHOD_OPTIONS
from avcil_dist.config.section import ChangeClass
from avcil_dist.config.serialization import flatten

KEYS = {field.key for field in schema_fields()}
OPERATIONAL = {
    "data.made_by",
    "output",
    "data.manifest",
    "data.decode_workers",
    "data.read_threads",
    "data.shard_cache",
    "data.shard_cache_gigabytes",
    "data.clip_cache",
    "data.prefetch_shards",
    "data.retry_seconds",
    "optim.global_eval_batch",
}
RESULT_OF_THE_ENGINE = {"engine.precision", "engine.max_grad_norm"}


def expected_class(key: str) -> ChangeClass:
    """The class of each key, written out by section: a check of the markers at the fields."""
    section = key.split(".")[0]
    if (
        section in ("scenario", "model")
        or key.startswith(("data.clip.", "data.limit."))
        or key in ("method.name", "data.source_disjoint")
    ):
        return ChangeClass.INCOMPARABLE
    if key in OPERATIONAL or (section in ("engine", "snapshot", "tracking") and key not in RESULT_OF_THE_ENGINE):
        return ChangeClass.OPERATIONAL
    return ChangeClass.FORK


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_setting_has_its_class_of_change(key: str) -> None:
    assert change_class(key) is expected_class(key)


@pytest.mark.parametrize("name", ["features", "pool", "unit_length", "expansion", "expansion_seed", "parts"])
def test_options_that_the_state_of_earlier_steps_depends_on_are_incomparable(name: str) -> None:
    assert change_class(f"method.{name}") is ChangeClass.INCOMPARABLE


def test_an_option_has_the_same_class_in_each_method() -> None:
    for field in method_fields(METHOD_OPTIONS):
        assert field.change is change_class(field.key), (field.key, field.kind)


def test_settings_outside_the_schema_have_a_class_too() -> None:
    assert change_class(MANIFEST_HASH) is ChangeClass.INCOMPARABLE
    assert change_class("method.lambda_class") is ChangeClass.FORK
    assert change_class("engine.of_another_version") is ChangeClass.FORK


def test_every_setting_has_a_description_that_is_a_sentence() -> None:
    for field in schema_fields():
        assert field.description[:1].isupper(), field.key
        assert field.description.endswith("."), field.key


@pytest.mark.parametrize("name", sorted(path.stem for path in (shipped_configs() / "benchmark").glob("*.yaml")))
def test_every_key_of_a_configuration_is_a_field_or_an_option_of_the_method(name: str) -> None:
    keys = {key for key in flatten(load_config(name)) if not key.startswith("method.")}
    assert keys <= KEYS


def test_equal_configurations_have_no_changes() -> None:
    settings = flatten(load_config("demo"))
    assert setting_changes(settings, settings) == []


def test_changes_are_listed_by_key_and_operational_ones_do_not_change_the_results() -> None:
    before = flatten(load_config("demo"))
    after = flatten(load_config("demo", ["optim.lr=0.5", "data.read_threads=3", "model.visual.dim=32", "seed=4"]))
    changes = setting_changes(before, after)
    assert [(change.key, change.after, change.change_class) for change in changes] == [
        ("data.read_threads", 3, ChangeClass.OPERATIONAL),
        ("model.visual.dim", 32, ChangeClass.INCOMPARABLE),
        ("optim.lr", 0.5, ChangeClass.FORK),
        ("seed", 4, ChangeClass.FORK),
    ]
    assert changes[2].before == before["optim.lr"]
    assert result_changes(before, after) == changes[1:]


def test_a_setting_that_one_side_lacks_is_a_change() -> None:
    (change,) = setting_changes({"method.name": "lwf"}, {"method.name": "lwf", "method.new": 1})
    assert (change.key, change.before, change.after) == ("method.new", None, 1)


def test_the_settings_that_determine_the_results_leave_out_operational_ones() -> None:
    settings = {"optim.lr": 1, "output": "x", "engine.precision": "bf16", "engine.zero_stage": 2, "method.any": 3}
    assert result_settings(settings) == {"optim.lr": 1, "engine.precision": "bf16", "method.any": 3}
