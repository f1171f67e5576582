"""Heads from sums over clips, each against its formula on all clips at once, in numpy or scikit-learn."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import empirical_covariance
from sklearn.linear_model import Ridge

from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext
from avcil_dist.methods.sums_head import SumsHead
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.seeds import generator

CELLS, DIM = 2, 5
WIDTH = (CELLS + 1) * DIM
SIZES = {"c0": 20, "c1": 31, "c2": 12, "c3": 25}  # clips
SCENARIO = Scenario((("c2",), ("c0", "c3"), ("c1",)))
LABELS = np.repeat(np.arange(4), [SIZES[name] for name in SCENARIO.classes])
TARGETS = np.eye(4)[LABELS]


def clips_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sound (clips, D) and pictures (clips, cells, D)."""
    random = torch.Generator().manual_seed(int(name[1:]))
    rows = torch.randn(SIZES[name], CELLS + 1, DIM, generator=random) + torch.randn(CELLS + 1, DIM, generator=random)
    return rows[:, 0], rows[:, 1:]


def output_of(audio: torch.Tensor, visual: torch.Tensor) -> Output:
    return Output(torch.zeros(len(audio), 0), audio, visual)


def learn(name: str, **options: Any) -> SumsHead:
    """All steps, each by a new method with the state of the one before, as it comes out of an artifact."""
    state: dict[str, Any] = {}
    for step in range(SCENARIO.num_steps):
        method = make_method(MethodConfig.model_validate({"name": name} | options))
        assert isinstance(method, SumsHead)
        method.load_state_dict(state)
        method.begin_step(StepContext(SCENARIO, step))
        method.begin_sums({SCENARIO.labels[new]: SIZES[new] for new in SCENARIO.new(step)})
        for new in SCENARIO.new(step):
            for audio, visual in zip(*(part.split(6) for part in clips_of(new)), strict=True):
                method.accumulate(output_of(audio, visual), torch.full((len(audio),), SCENARIO.labels[new]))
        method.statistics()
        method.choose(method.solve(), [])
        state = {
            k: v if isinstance(v, torch.Tensor) else json.loads(json.dumps(v)) for k, v in method.state_dict().items()
        }
    return method


def features(kept: slice = slice(0, CELLS + 1)) -> np.ndarray:
    """Features of all clips (clips, width), float64."""
    rows = [torch.cat([audio[:, None], visual], dim=1) for audio, visual in map(clips_of, SCENARIO.classes)]
    return torch.cat(rows)[:, kept].flatten(1).double().numpy()


def scores(method: SumsHead, **changes: Any) -> np.ndarray:
    pairs = [clips_of(name) for name in SCENARIO.classes]
    output = output_of(torch.cat([audio for audio, _ in pairs]), torch.cat([visual for _, visual in pairs]))
    return method.scores(output._replace(**changes)).numpy()


def class_means(x: np.ndarray) -> np.ndarray:
    return np.stack([x[label == LABELS].mean(axis=0) for label in range(4)])


def cosines(x: np.ndarray) -> np.ndarray:
    means = class_means(x)
    return x @ means.T / np.linalg.norm(means, axis=1)


def discriminants(x: np.ndarray, shrinkage: float) -> np.ndarray:
    means = class_means(x)
    within = sum((label == LABELS).mean() * empirical_covariance(x[label == LABELS]) for label in range(4))
    inverse = np.linalg.inv((1 - shrinkage) * within + shrinkage * np.eye(x.shape[1]))
    return np.stack([x @ inverse @ mean - mean @ inverse @ mean / 2 for mean in means], axis=1)


def expanded(x: np.ndarray, size: int, seed: int) -> np.ndarray:
    """relu of a random map of x with a constant, and a constant."""
    phi = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    drawn = generator(seed, "expansion", phi.shape[1]).standard_normal((phi.shape[1], size), dtype=np.float32)
    return np.concatenate([np.maximum(phi @ drawn / np.sqrt(phi.shape[1]), 0), np.ones((len(x), 1))], axis=1)


def ridge_scores(phi: np.ndarray, gamma: float, clip_weights: np.ndarray | None = None) -> np.ndarray:
    model = Ridge(alpha=gamma, fit_intercept=False, solver="cholesky").fit(phi, TARGETS, sample_weight=clip_weights)
    return model.predict(phi)


PARTS = {
    "whole": ({}, slice(0, 3)),
    "sound": ({"visual": None}, slice(0, 1)),
    "pictures": ({"audio": None}, slice(1, 3)),
}


@pytest.mark.parametrize("part", PARTS)
def test_ncm_is_the_cosine_with_the_class_means_times_the_length_of_the_features(part: str) -> None:
    changes, kept = PARTS[part]
    np.testing.assert_allclose(scores(learn("ncm"), **changes), cosines(features(kept)), atol=1e-6)


def test_the_cosine_of_ncm_does_not_depend_on_the_length_of_the_features() -> None:
    method = make_method(MethodConfig(name="ncm"))
    assert isinstance(method, SumsHead)
    method.begin_step(StepContext(Scenario((("a",),)), 0))
    audio, visual = clips_of("c0")
    method.accumulate(output_of(1e-4 * audio, 1e-4 * visual), torch.zeros(len(audio), dtype=torch.long))
    method.statistics()
    method.choose(method.solve(), [])
    assert method.state_dict()["weights"].norm().item() == pytest.approx(1)


def test_ncm_keeps_no_products_of_features() -> None:
    assert set(learn("ncm").state_dict()) == {"weights", "targets"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shrinkage", [1e-4, 0.3])
def test_slda_is_the_discriminant_of_the_shrunk_covariance_within_classes(part: str, shrinkage: float) -> None:
    changes, kept = PARTS[part]
    found = scores(learn("slda", shrinkage=shrinkage), **changes)
    np.testing.assert_allclose(found, discriminants(features(kept), shrinkage), rtol=1e-6, atol=1e-5)


def test_acil_is_the_ridge_regression_on_a_random_expansion() -> None:
    method = learn("acil", gammas=[0.7], expansion=40, expansion_seed=3)
    np.testing.assert_allclose(scores(method), ridge_scores(expanded(features(), 40, 3), 0.7), atol=1e-5)
    assert not method.takes_one_modality


@pytest.mark.parametrize("expansion", [0, 40])
def test_air_is_the_ridge_regression_with_clips_weighted_by_the_inverse_size_of_their_class(expansion: int) -> None:
    phi = expanded(features(), 40, 0) if expansion else np.concatenate([features(), np.ones((len(LABELS), 1))], axis=1)
    weights = 1 / np.bincount(LABELS)[LABELS]
    found = scores(learn("air", gammas=[0.05], expansion=expansion))
    np.testing.assert_allclose(found, ridge_scores(phi, 0.05, weights), atol=1e-5 if expansion else 1e-10)


def test_air_gives_the_only_clip_of_a_class_the_weight_of_a_class() -> None:
    method = make_method(MethodConfig.model_validate({"name": "air", "gammas": [0.1], "expansion": 0}))
    assert isinstance(method, SumsHead)
    method.begin_step(StepContext(Scenario((("a", "b"),)), 0))
    method.begin_sums({0: 19, 1: 1})
    method.accumulate(output_of(*clips_of("c0")), torch.tensor([0] * 19 + [1]))
    method.statistics()
    method.choose(method.solve(), [])
    targets = method.state_dict()["targets"]
    np.testing.assert_allclose(targets[-1].numpy(), [1, 1], rtol=1e-12)  # the constant's sums are the classes' weights


def test_ranpac_is_the_ridge_regression_on_a_random_projection_without_a_constant() -> None:
    drawn = generator(2, "expansion", WIDTH).standard_normal((WIDTH, 50), dtype=np.float32)
    found = scores(learn("ranpac", gammas=[3.0], expansion=50, expansion_seed=2))
    np.testing.assert_allclose(found, ridge_scores(np.maximum(features() @ drawn, 0), 3.0), atol=1e-4)


@pytest.mark.parametrize("name", ["ncm", "slda"])
def test_tokens_of_unit_length_are_an_option_of_every_head(name: str) -> None:
    rows = features().reshape(len(LABELS), CELLS + 1, DIM)
    units = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).reshape(len(LABELS), WIDTH)
    expected = cosines(units) if name == "ncm" else discriminants(units, 1e-4)
    np.testing.assert_allclose(scores(learn(name, unit_length=True)), expected, rtol=1e-5, atol=1e-4)


def test_a_network_of_step_0_has_no_features_of_one_modality() -> None:
    assert not make_method(MethodConfig.model_validate({"name": "ncm", "features": "network"})).takes_one_modality
    assert make_method(MethodConfig(name="slda")).takes_one_modality
    assert not make_method(MethodConfig(name="avcil")).takes_one_modality


def test_a_class_without_clips_scores_nothing() -> None:
    method = make_method(MethodConfig(name="ncm"))
    assert isinstance(method, SumsHead)
    method.begin_step(StepContext(Scenario((("a", "b"),)), 0))
    method.accumulate(output_of(*clips_of("c0")), torch.zeros(SIZES["c0"], dtype=torch.long))
    method.statistics()
    method.choose(method.solve(), [])
    assert scores(method)[:, 1].tolist() == [0.0] * len(LABELS)


def test_slda_has_the_mean_of_a_class_of_one_clip() -> None:
    method = make_method(MethodConfig(name="slda"))
    assert isinstance(method, SumsHead)
    method.begin_step(StepContext(Scenario((("a", "b"),)), 0))
    audio, visual = clips_of("c0")
    labels = torch.tensor([0] * (SIZES["c0"] - 1) + [1])
    method.accumulate(output_of(audio, visual), labels)
    method.statistics()
    method.choose(method.solve(), [])
    x = torch.cat([audio[:, None], visual], dim=1).flatten(1).double().numpy()
    means = [x[:-1].mean(axis=0), x[-1]]
    covariance = (1 - 1e-4) * empirical_covariance(x[:-1]) * (len(x) - 1) / len(x) + 1e-4 * np.eye(WIDTH)
    inverse = np.linalg.inv(covariance)
    expected = np.stack([x @ inverse @ mean - mean @ inverse @ mean / 2 for mean in means], axis=1)
    np.testing.assert_allclose(method.scores(output_of(audio, visual)).numpy(), expected, rtol=1e-5, atol=1e-4)


def test_features_that_are_not_finite_are_an_error_of_one_line() -> None:
    method = make_method(MethodConfig(name="slda"))
    assert isinstance(method, SumsHead)
    method.begin_step(StepContext(Scenario((("a",),)), 0))
    method.accumulate(output_of(torch.full((3, DIM), torch.inf), torch.zeros(3, CELLS, DIM)), torch.tensor([0, 0, 0]))
    method.statistics()
    with pytest.raises(ConfigError, match=r"^method.shrinkage=0.0001 is too small"):
        method.solve()
