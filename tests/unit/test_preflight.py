"""Preflight: needs of methods against configuration and data; the list of methods with their needs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from avcil_dist.compose import load_config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.methods import method_names
from avcil_dist.methods.base import Needs
from avcil_dist.models.extension import Extension
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.scenario import Scenario
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training import preflight as preflight_module
from avcil_dist.training.preflight import check_method_fits, describe_needs, preflight
from data_shards.build import build_shards
from data_shards.random_features import make_feature_shards
from launch.cli.main import cli
from tests.helpers.rendered import render_tiny
from tests.helpers.streams import write_config


def refused(path: Path, *words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        preflight(load_config(str(path), words), [1], restart=True)
    line = str(raised.value)
    assert "\n" not in line
    return line


def test_analytic_has_nothing_for_zero_to_shard(tmp_path: Path) -> None:
    line = refused(write_config(tmp_path), "method=analytic", "engine=zero2")
    assert line.startswith("engine.zero_stage=2: method analytic")
    assert line.endswith("use engine=zero0")


def test_a_memory_of_size_0_is_refused_with_the_methods_that_need_none(tmp_path: Path) -> None:
    line = refused(write_config(tmp_path), "method=ssil", "memory.size=0")
    assert line.startswith("memory.size=0: method ssil needs an exemplar per class, 5 in all")
    assert line.endswith("acil, air, analytic, finetune, joint, kernel, lwf, ncm, ranpac, slda")


@pytest.mark.parametrize("needs", [Needs(stored_logits=True), Needs(means=True)])
def test_a_method_that_keeps_something_of_exemplars_has_a_memory(tmp_path: Path, needs: Needs) -> None:
    config = load_config(str(write_config(tmp_path)))
    manifest = load_manifest(config.data.manifest)
    with pytest.raises(ConfigError, match=r'its `needs` must have memory="replay" or'):
        check_method_fits(config, needs, manifest, scenario_of(config, manifest))
    check_method_fits(config, replace(needs, memory="join"), manifest, scenario_of(config, manifest))


def test_prediction_by_means_needs_an_exemplar_of_the_last_classes_too(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert "6 in all" in refused(path, "method=icarl", "memory.size=5")
    preflight(load_config(str(path), ["method=icarl", "method.predict=fc", "memory.size=5"]), [1], restart=True)


def test_analytic_chooses_gamma_on_validation_clips(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": 24, "test": 10})
    words = ["method=analytic", "method.gamma=validation", "optim.keep_epoch=last"]
    assert "has no val clips" in refused(path, *words)
    preflight(load_config(str(path), [*words, "method.gammas=[1.0]"]), [1], restart=True)


def test_validation_clips_are_needed_only_where_they_select_the_epoch(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": 24, "test": 10})
    assert "has no val clips" in refused(path, "method=finetune", "optim.keep_epoch=best_val")
    preflight(load_config(str(path), ["method=finetune", "optim.keep_epoch=last"]), [1], restart=True)


def test_analytic_needs_no_full_batch(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert "has only 24 training clips" in refused(path, "method=finetune", "optim.global_batch=48")
    preflight(load_config(str(path), ["method=analytic", "optim.global_batch=48"]), [1], restart=True)


def test_a_class_without_training_clips_is_refused_by_name(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    make_feature_shards(tmp_path / "shards", classes=6, clips={"val": 6, "test": 10})
    assert "class 'class_000' has no train clips" in refused(path, "method=analytic")


def test_a_source_disjoint_test_of_nothing_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    make_feature_shards(
        tmp_path / "shards",
        classes=6,
        clips={"train": 24, "val": 6, "test": 10},
        key=lambda split, number, row: f"video{number}-{row % 4}_{split}-{row}",
    )
    assert "every test clip of step 0" in refused(path, "data.source_disjoint=true")
    preflight(load_config(str(path), ["data.source_disjoint=false"]), [1], restart=True)
    make_feature_shards(
        tmp_path / "shards",
        classes=6,
        clips={"train": 24, "val": 6, "test": 10},
        key=lambda split, number, row: f"video{number}-{row % (5 if split == 'test' else 4)}_{split}-{row}",
    )
    preflight(load_config(str(path), ["data.source_disjoint=true"]), [1], restart=True)  # video 4 is in the test alone


@pytest.mark.slow
def test_analytic_on_clips_wants_encoders_that_stay_as_they_are(tmp_path: Path) -> None:
    manifest = build_shards(
        render_tiny(tmp_path / "clips"),
        str(tmp_path / "shards"),
        clips_per_shard=8,
        min_seconds=0.5,
        processes=1,
        strict=True,
    ).manifest_url
    words = ["method=analytic", f"data.manifest={manifest}", "scenario.classes_per_step=1", "optim.global_batch=2"]
    with pytest.raises(ConfigError, match=r"encoder of kind small is trained; .* or method.features=network"):
        preflight(load_config("demo", words), [1], restart=True)
    preflight(load_config("demo", [*words, "method.features=network"]), [1], restart=True)


def test_shards_are_checked_unless_the_ranks_of_a_launcher_check_them_together(
    tmp_path: Path,
) -> None:
    config = load_config(str(write_config(tmp_path)))
    missing = Path(load_manifest(config.data.manifest).url(0))
    missing.unlink()
    with pytest.raises(DataError, match=f"{missing}: missing"):
        preflight(config, [1], restart=True)
    assert preflight(config, [1], restart=True, with_shards=False).num_steps == 3


def test_the_shards_of_the_last_step_are_checked_too(tmp_path: Path) -> None:
    config = load_config(str(write_config(tmp_path)))
    manifest = load_manifest(config.data.manifest)
    missing = Path(manifest.url(manifest.shard_numbers(manifest.classes[-1:], "test")[0]))
    missing.unlink()
    with pytest.raises(DataError, match=f"{missing}: missing"):
        preflight(config, [1], restart=True)


def test_pooled_tokens_of_clips_need_encoders_that_are_not_trained() -> None:
    config, scenario = load_config("demo", ["method=finetune"]), Scenario((("a",),))
    pooled = Needs(network_spec=NetworkSpec(pool=(8, 1)))
    manifests: dict[str, Any] = {kind: SimpleNamespace(kind=kind) for kind in ("clip", "feature")}
    check_method_fits(config, Needs(), manifests["clip"], scenario)
    check_method_fits(config, pooled, manifests["feature"], scenario)
    with pytest.raises(ConfigError, match=r"encoder of kind small is trained; .* or method\.features=network"):
        check_method_fits(config, pooled, manifests["clip"], scenario)


def test_an_anchor_in_the_tokens_of_clips_needs_pretrained_encoders() -> None:
    needs = Needs(network_spec=NetworkSpec(anchor=8))
    manifests: dict[str, Any] = {kind: SimpleNamespace(kind=kind) for kind in ("clip", "feature")}
    scenario = Scenario((("a",),))
    check_method_fits(load_config("demo"), needs, manifests["feature"], scenario)
    check_method_fits(load_config("ave_ci_video"), needs, manifests["clip"], scenario)
    with pytest.raises(ConfigError, match="is anchored in the tokens of pretrained encoders, and one of kind small"):
        check_method_fits(load_config("demo"), needs, manifests["clip"], scenario)
    adapters = ["train=adapters", "last_blocks=null", "adapter_rank=8"]
    words = [f"model.{modality}.{word}" for modality in ("visual", "audio") for word in adapters]
    with pytest.raises(ConfigError, match="anchored in tokens that stay, and adapters change them at step 0"):
        check_method_fits(load_config("ave_ci_video", words), needs, manifests["clip"], scenario)


def test_methods_are_listed_with_needs_and_options() -> None:
    listed = CliRunner().invoke(cli, ["methods"])
    assert listed.exit_code == 0
    for name in method_names():
        assert f"\n{name}: " in f"\n{listed.output}"
    assert "needs    teacher, memory" not in listed.output
    assert "option   predict=nme (nme | fc)" in listed.output
    assert "needs    nothing" in listed.output


def test_every_need_of_a_method_is_described() -> None:
    assert describe_needs(Needs()) == []
    described = {
        "teacher": Needs(teacher=True),
        "memory (exemplars beside current clips)": Needs(memory="replay"),
        "memory (exemplars join)": Needs(memory="join"),
        "herding": Needs(selection="herding"),
        "features of exemplars": Needs(means=True),
        "logits stored with exemplars": Needs(stored_logits=True),
        "sampling weights": Needs(weighted_sampling=True),
        "parameters of its own": Needs(network_spec=NetworkSpec(extension=lambda dim, num_classes: Extension())),
        "shared layers that are frozen after step 0": Needs(network_spec=NetworkSpec(freeze_shared=True)),
        "attention of both modalities": Needs(divergence=True),
        "both modalities": Needs(both_modalities=True),
        "gradients of the teacher": Needs(importance=True),
        "a head of proxies": Needs(network_spec=NetworkSpec(head="proxies")),
        "projections for each step": Needs(network_spec=NetworkSpec(branches=True)),
        "a booster": Needs(network_spec=NetworkSpec(booster=True)),
        "all data of seen classes": Needs(all_data=True),
        "whole classes": Needs(whole_classes=True),
        "a fresh network each step": Needs(fresh_network=True),
        "fixed scores of the analytic head": Needs(network_spec=NetworkSpec(anchor=8)),
        "features of all clips": Needs(clip_features=True),
        "validation clips": Needs(validation=True),
        "a correction by logits of validation clips": Needs(calibration=True),
        "the network before training": Needs(untrained=True),
        "gradients at step 0 alone": Needs(training="first step"),
        "no gradients": Needs(training="never"),
    }
    assert {text: describe_needs(needs) for text, needs in described.items()} == {text: [text] for text in described}


def test_features_are_refused_for_encoders_of_clips(tmp_path: Path) -> None:
    line = refused(write_config(tmp_path), "model.visual={kind: small}", "model.audio={kind: small}")
    assert "holds features, which model.visual.kind=small cannot take" in line


def test_batches_must_fit_each_of_the_world_sizes(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    preflight(load_config(path), [1, 2], restart=True)
    batch, replay = "optim.global_batch=12", "optim.global_replay_batch"
    for sizes, words, text in (
        ([1, 5], [batch], r"optim\.global_batch=12 cannot be shared by 5 processes"),
        (
            [1, 2],
            [batch, f"{replay}=5"],
            r"optim\.global_replay_batch=5 cannot be shared by 2 processes",
        ),
        ([2], [batch, f"{replay}=8", "engine.micro_batch=4"], r"6 current clips and 4 exemplars"),
    ):
        with pytest.raises(ConfigError, match=text):
            preflight(load_config(path, words), sizes, restart=True)
    words = ["method=lwf", batch, f"{replay}=8", "engine.micro_batch=4"]
    preflight(load_config(path, words), [1, 2], restart=True)  # without replay, 4 of 12 clips at a time, or 3 of 6


def test_a_stream_with_committed_steps_is_refused_for_other_settings_unless_it_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(write_config(tmp_path)))
    checked: list[int] = []
    monkeypatch.setattr(preflight_module, "check_continues", lambda _config, _manifest, step: checked.append(step))
    preflight(config, [1], restart=False)
    assert checked == []  # nothing is committed
    monkeypatch.setattr(preflight_module, "next_step", lambda _stream, num_steps: num_steps - 1)
    preflight(config, [1], restart=True)
    assert checked == []
    preflight(config, [1], restart=False)
    assert checked == [2]
