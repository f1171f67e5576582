"""Each method's needs and settings."""

from typing import Any

import pytest

from avcil_dist.config.method_options import METHOD_OPTIONS
from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method, method_class, method_names
from avcil_dist.methods.base import Needs
from avcil_dist.models.network_spec import NetworkSpec

PROXIES = NetworkSpec(head="proxies", num_proxies=10)
GRID = NetworkSpec(pool=(8, 1))
NEEDS: list[tuple[dict[str, Any], Needs]] = [
    ({"name": "finetune"}, Needs()),
    ({"name": "joint"}, Needs(all_data=True, fresh_network=True)),
    ({"name": "lwf"}, Needs(teacher=True, whole_classes=True)),
    (
        {"name": "anchored", "parts": 4},
        Needs(teacher=True, memory="replay", untrained=True, network_spec=NetworkSpec(anchor=4)),
    ),
    ({"name": "ssil"}, Needs(teacher=True, memory="replay", whole_classes=True)),
    (
        {"name": "avcil"},
        Needs(teacher=True, memory="replay", divergence=True, both_modalities=True, whole_classes=True),
    ),
    (
        {"name": "avcil", "instance": False, "class_aware": False, "attention": False},
        Needs(teacher=True, memory="replay", whole_classes=True),
    ),
    ({"name": "icarl"}, Needs(teacher=True, memory="join", selection="herding", means=True)),
    ({"name": "icarl", "predict": "fc"}, Needs(teacher=True, memory="join", selection="herding")),
    (
        {"name": "afc"},
        Needs(teacher=True, memory="join", selection="herding", means=True, importance=True, network_spec=PROXIES),
    ),
    (
        {"name": "afc", "predict": "lsc"},
        Needs(teacher=True, memory="join", selection="herding", importance=True, network_spec=PROXIES),
    ),
    ({"name": "analytic"}, Needs(training="never", validation=True, network_spec=GRID)),
    ({"name": "analytic", "gammas": [1.0]}, Needs(training="never", network_spec=GRID)),
    ({"name": "analytic", "features": "network"}, Needs(training="first step", validation=True)),
    ({"name": "analytic", "gamma": "evidence"}, Needs(training="never", network_spec=GRID)),
    ({"name": "er"}, Needs(memory="replay")),
    ({"name": "derpp"}, Needs(teacher=True, memory="replay")),
    ({"name": "derpp", "logits": "stored"}, Needs(memory="replay", stored_logits=True)),
    ({"name": "wa"}, Needs(teacher=True, memory="join", selection="herding")),
    (
        {"name": "bic"},
        Needs(teacher=True, memory="join", selection="herding", validation=True, calibration=True),
    ),
    (
        {"name": "memo"},
        Needs(memory="join", selection="herding", network_spec=NetworkSpec(branches=True)),
    ),
    (
        {"name": "memo", "train_shared": False},
        Needs(memory="join", selection="herding", network_spec=NetworkSpec(branches=True, freeze_shared=True)),
    ),
    (
        {"name": "foster"},
        Needs(teacher=True, memory="join", selection="herding", network_spec=NetworkSpec(booster=True)),
    ),
    ({"name": "acil"}, Needs(training="never", validation=True, network_spec=GRID)),
    ({"name": "air"}, Needs(training="never", validation=True, whole_classes=True, network_spec=GRID)),
    ({"name": "ranpac"}, Needs(training="never", validation=True, network_spec=GRID)),
    ({"name": "kernel"}, Needs(training="never", network_spec=GRID, clip_features=True)),
    ({"name": "ncm"}, Needs(training="never", network_spec=GRID)),
    ({"name": "slda"}, Needs(training="never", network_spec=GRID)),
]
METHODS = sorted({options["name"] for options, _ in NEEDS})


@pytest.mark.parametrize(("options", "needs"), NEEDS, ids=[str(options) for options, _ in NEEDS])
def test_each_method_needs_what_it_is_published_with(options: dict[str, Any], needs: Needs) -> None:
    assert make_method(MethodConfig.model_validate(options)).needs == needs


def test_every_method_has_its_needs_tested() -> None:
    assert method_names() == METHODS
    for name in METHODS:
        assert method_class(name).__module__ == f"avcil_dist.methods.{name}"
        assert method_class(name).Options is METHOD_OPTIONS[name]
    with pytest.raises(ConfigError, match=r"method\.name: 'losses' is none of acil, afc"):
        method_class("losses")


def test_defaults_are_those_of_the_papers() -> None:
    avcil = make_method(MethodConfig(name="avcil")).options
    assert (avcil.variant, avcil.instance, avcil.class_aware, avcil.attention) == ("released", True, True, True)
    assert (avcil.lambda_instance, avcil.lambda_class, avcil.lambda_attention) == (0.1, 1.0, 0.5)
    assert (avcil.contrast_temperature, avcil.distillation_temperature) == (0.05, 2.0)
    for name in ("lwf", "ssil", "wa"):
        assert make_method(MethodConfig(name=name)).options.distillation_temperature == 2.0
    icarl, afc = make_method(MethodConfig(name="icarl")).options, make_method(MethodConfig(name="afc")).options
    assert (icarl.variant, icarl.predict) == ("released", "nme")
    assert (afc.predict, afc.num_proxies, afc.lambda_discrepancy) == ("nme", 10, 0.5)
    analytic = make_method(MethodConfig(name="analytic")).options
    assert (analytic.features, analytic.pool, analytic.expansion, analytic.expansion_seed) == ("tokens", (8, 1), 0, 0)
    assert analytic.gammas == [10.0**power for power in range(-2, 7)]
    assert (analytic.gamma, analytic.unit_length) == ("validation", False)  # as artifacts without these settings
    ranpac = make_method(MethodConfig(name="ranpac")).options
    assert (ranpac.expansion, min(ranpac.gammas), max(ranpac.gammas)) == (10_000, 1e-8, 1e8)
    for name in ("acil", "air"):
        assert make_method(MethodConfig(name=name)).options.expansion == 8192
    assert make_method(MethodConfig(name="slda")).options.shrinkage == 1e-4
    derpp = make_method(MethodConfig(name="derpp")).options
    assert (derpp.logits, derpp.lambda_logits, derpp.lambda_labels) == ("previous", 0.1, 0.5)
    memo = make_method(MethodConfig(name="memo")).options
    assert (memo.lambda_auxiliary, memo.train_shared) == (1.0, True)
    kernel = make_method(MethodConfig(name="kernel")).options
    assert (kernel.gamma, kernel.visual_weight, kernel.pool, kernel.keep_factor) == (0.01, 0.7, (8, 1), False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("avcil", {"lambda_instance": -0.1}),
        ("avcil", {"lambda_class": -0.1}),
        ("avcil", {"lambda_attention": 1.1}),
        ("avcil", {"lambda_attention": -0.1}),
        ("avcil", {"contrast_temperature": 0}),
        ("afc", {"num_proxies": 0}),
        ("afc", {"lambda_discrepancy": -0.1}),
        ("analytic", {"gammas": []}),
        ("analytic", {"gammas": [0.0]}),
        ("analytic", {"expansion": -1}),
        ("analytic", {"pool": [0, 1]}),
        ("derpp", {"lambda_logits": -0.1}),
        ("derpp", {"lambda_labels": -0.1}),
        ("memo", {"lambda_auxiliary": -0.1}),
        ("kernel", {"gamma": 0}),
        ("kernel", {"visual_weight": 1.0}),
        ("kernel", {"visual_weight": 0.0}),
        ("slda", {"shrinkage": 0}),
        ("ranpac", {"expansion": 0}),
        ("finetune", {"unknown": 1}),
    ],
)
def test_settings_without_meaning_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^method\."):
        make_method(MethodConfig.model_validate({"name": name} | options))


def test_a_weight_of_zero_is_allowed() -> None:
    make_method(MethodConfig.model_validate({"name": "avcil", "lambda_instance": 0, "lambda_class": 0}))
    make_method(MethodConfig.model_validate({"name": "avcil", "lambda_attention": 0}))
    make_method(MethodConfig.model_validate({"name": "avcil", "lambda_attention": 1}))
    make_method(MethodConfig.model_validate({"name": "afc", "lambda_discrepancy": 0}))


def test_steps_that_train_by_gradients() -> None:
    for training, trains in (("every step", [True, True]), ("first step", [True, False]), ("never", [False, False])):
        needs = Needs(training=training)  # type: ignore[arg-type]
        assert [needs.trains_at(step) for step in (0, 1)] == trains


def test_a_method_needs_nothing_unless_it_lists_it() -> None:
    assert Needs() == Needs(
        teacher=False,
        memory="none",
        selection="random",
        means=False,
        stored_logits=False,
        weighted_sampling=False,
        divergence=False,
        importance=False,
        both_modalities=False,
        all_data=False,
        fresh_network=False,
        whole_classes=False,
        clip_features=False,
        max_clips=None,
        validation=False,
        calibration=False,
        untrained=False,
        training="every step",
        network_spec=NetworkSpec(head="linear", pool=None),
    )


def test_of_all_methods_only_avcil_has_a_static_loss() -> None:
    assert [name for name in METHODS if method_class(name).has_static_loss] == ["avcil"]
