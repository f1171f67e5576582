"""Analytic learning equals ridge regression on all data so far, whatever the steps and the order."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method
from avcil_dist.methods.analytic import Analytic
from avcil_dist.methods.base import StepContext
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.network import PooledTokens
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.seeds import generator

DIM, PER_CLASS = 24, 30
GAMMAS = [0.1, 10.0, 1000.0]


def analytic(**options: Any) -> Analytic:
    method = make_method(MethodConfig.model_validate({"name": "analytic", "gammas": GAMMAS} | options))
    assert isinstance(method, Analytic)
    return method


def clips_of(name: str, dim: int = DIM) -> torch.Tensor:
    random = torch.Generator().manual_seed(int(name[1:]))
    return torch.randn(PER_CLASS, dim, generator=random) + torch.randn(1, dim, generator=random)


def output_of(features: torch.Tensor) -> Output:
    half = features.shape[1] // 2
    return Output(features.new_zeros(len(features), 0), features[:, :half], features[:, half:])


def learn(scenario: Scenario, *, choose: list[float], batch: int = 7, dim: int = DIM, **options: Any) -> Analytic:
    """All steps, each by a new method with the state of the one before, as it comes out of an artifact."""
    state: dict[str, Any] = {}
    for step in range(scenario.num_steps):
        method = analytic(**options)
        method.load_state_dict(state)
        method.begin_step(StepContext(scenario, step))
        for name in scenario.new(step):
            for features in clips_of(name, dim).split(batch):
                method.accumulate(output_of(features), torch.full((len(features),), scenario.labels[name]))
        method.statistics()
        method.choose(method.solve(), choose)
        state = {
            k: v.clone() if isinstance(v, torch.Tensor) else json.loads(json.dumps(v))
            for k, v in method.state_dict().items()
        }
    return method


def ridge(scenario: Scenario, gamma: float, dim: int = DIM) -> np.ndarray:
    """The textbook solution, of all clips at once, in float64."""
    features = torch.cat([clips_of(name, dim) for name in scenario.classes]).double().numpy()
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    labels = np.repeat(np.arange(len(scenario.classes)), PER_CLASS)
    targets = np.eye(len(scenario.classes))[labels]
    return np.linalg.solve(features.T @ features + gamma * np.eye(features.shape[1]), features.T @ targets)


SCENARIOS = [
    Scenario((("c0", "c1", "c2", "c3", "c4", "c5"),)),
    Scenario((("c0", "c1", "c2"), ("c3", "c4"), ("c5",))),
    Scenario((("c4",), ("c1", "c5", "c0"), ("c3", "c2"))),
    Scenario(tuple((f"c{n}",) for n in (5, 3, 1, 0, 2, 4))),
]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("best", [0, 1, 2])
def test_any_steps_in_any_order_give_the_ridge_regression_on_the_union(scenario: Scenario, best: int) -> None:
    method = learn(scenario, choose=[float(number == best) for number in range(3)])
    assert method.gamma == sorted(GAMMAS, reverse=True)[best]
    np.testing.assert_allclose(method.weights.numpy(), ridge(scenario, method.gamma), rtol=0, atol=1e-8)


def test_sums_in_several_panels_and_many_clips_at_a_time_are_the_same() -> None:
    # 1,100 features make two panels; 60 · 30 clips pass the number that is summed at a time.
    scenario, dim = Scenario((("c0", "c1"), ("c2",))), 1100
    method = learn(scenario, choose=[0.0, 1.0, 0.0], batch=30, dim=dim)
    assert {name for name in method.state_dict() if name.startswith("gram")} == {"gram_000", "gram_001"}
    np.testing.assert_allclose(method.weights.numpy(), ridge(scenario, 10.0, dim), rtol=0, atol=1e-8)


def test_many_clips_are_summed_in_several_products() -> None:
    scenario = Scenario((tuple(f"c{n}" for n in range(40)),))  # 1,200 clips
    method = learn(scenario, choose=[0.0, 1.0, 0.0], batch=30)
    np.testing.assert_allclose(method.weights.numpy(), ridge(scenario, 10.0), rtol=0, atol=1e-8)


def test_of_equally_good_gammas_the_largest_is_taken() -> None:
    assert learn(SCENARIOS[0], choose=[0.7, 0.9, 0.9]).gamma == 10.0
    assert learn(SCENARIOS[0], choose=[0.9, 0.9, 0.9]).gamma == 1000.0


def test_a_single_gamma_needs_no_validation() -> None:
    assert not analytic(gammas=[1.0]).needs.validation
    assert analytic().needs.validation
    assert learn(SCENARIOS[0], choose=[], gammas=[2.0]).gamma == 2.0


def test_scores_are_those_of_the_chosen_candidate() -> None:
    scenario = SCENARIOS[1]
    method = learn(scenario, choose=[0.0, 1.0, 0.0])
    features = clips_of("c3")
    expected = torch.cat([features, torch.ones(len(features), 1)], dim=1).double() @ method.weights
    torch.testing.assert_close(method.scores(output_of(features)), expected)
    assert method.scores(output_of(features)).argmax(dim=1).float().mean() == pytest.approx(3, abs=0.3)


def test_a_gamma_too_small_to_solve_with_is_passed_over() -> None:
    scenario = Scenario((("c0",),))  # 30 clips of 40 features: singular without γ
    method = learn(scenario, choose=[1.0, 0.0], dim=40, gammas=[1.0, 1e-300])
    np.testing.assert_allclose(method.weights.numpy(), ridge(scenario, 1.0, 40), rtol=0, atol=1e-8)
    with pytest.raises(ConfigError, match=r"method.gammas: \[1e-300\] are too small"):
        learn(scenario, choose=[], dim=40, gammas=[1e-300])


def test_an_expansion_is_fixed_by_its_seed_and_followed_by_a_constant() -> None:
    one, same, other = (learn(SCENARIOS[1], choose=[1, 0, 0], expansion=50, expansion_seed=s) for s in (1, 1, 2))
    assert one.weights.shape == (51, 6)
    assert torch.equal(one.weights, same.weights)
    assert not torch.equal(one.weights, other.weights)


def test_the_directions_of_an_expansion_are_normal_numbers_of_its_own_seed() -> None:
    method = learn(SCENARIOS[0], choose=[1, 0, 0], expansion=50, expansion_seed=3)
    drawn = generator(3, "expansion", DIM + 1).standard_normal((DIM + 1, 50), dtype=np.float32)
    features = clips_of("c1")
    phi = np.concatenate([features.numpy(), np.ones((PER_CLASS, 1))], axis=1)
    expanded = np.concatenate([np.maximum(phi @ drawn / np.sqrt(DIM + 1), 0), np.ones((PER_CLASS, 1))], axis=1)
    expected = expanded @ method.weights.numpy()
    np.testing.assert_allclose(method.scores(output_of(features)).numpy(), expected, rtol=0, atol=1e-5)


def test_a_class_with_one_clip_and_a_batch_of_none_are_summed() -> None:
    method = analytic(gammas=[1.0])
    method.begin_step(StepContext(Scenario((("a", "b"),)), 0))
    method.accumulate(output_of(torch.zeros(0, DIM)), torch.zeros(0, dtype=torch.long))
    method.accumulate(output_of(clips_of("c0")[:1]), torch.tensor([1]))
    method.statistics()
    method.choose(method.solve(), [])
    scores = method.scores(output_of(clips_of("c0")[:1]))
    assert scores.argmax().item() == 1
    assert scores[0, 0].item() == 0


@pytest.mark.parametrize(("grid", "width"), [((8, 1), 4), ((1, 1), 1), ((2, 3), 6), ((4, 99), 24)])
def test_tokens_are_pooled_to_the_grid_or_as_fine_as_they_are(grid: tuple[int, int], width: int) -> None:
    visual, audio = torch.randn(2, 4, 6, 5), torch.randn(2, 5)
    output = PooledTokens(Precomputed(5), Precomputed(5), grid)(visual, audio)
    assert output.visual.shape == (2, width, 5)
    torch.testing.assert_close(output.audio, audio)
    if grid == (8, 1):
        torch.testing.assert_close(output.visual, visual.mean(dim=2))
    if grid == (1, 1):
        torch.testing.assert_close(output.visual[:, 0], visual.mean(dim=(1, 2)))
