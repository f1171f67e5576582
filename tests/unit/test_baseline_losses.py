import math

import pytest
import torch
from torch import Tensor

from avcil_dist.methods.losses import feature_discrepancy, proxy_nca, sigmoid_distillation


def leaf(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def binary_cross_entropy(logit: float, target: float) -> float:
    probability = 1 / (1 + math.exp(-logit))
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


def test_sigmoid_distillation_takes_the_sigmoid_twice_as_released_and_once_on_paper() -> None:
    logits, teacher = leaf([[0.5, -1.0]]), torch.tensor([[2.0, 0.0]])
    answers = [1 / (1 + math.exp(-2.0)), 0.5]
    once = [binary_cross_entropy(logit, answer) for logit, answer in zip([0.5, -1.0], answers, strict=True)]
    squashed = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1.0))]
    twice = [binary_cross_entropy(logit, answer) for logit, answer in zip(squashed, answers, strict=True)]
    assert sigmoid_distillation(logits, teacher, "paper").item() == pytest.approx(sum(once) / 2, rel=1e-6)
    assert sigmoid_distillation(logits, teacher, "released").item() == pytest.approx(sum(twice) / 2, rel=1e-6)


def test_sigmoid_distillation_of_no_clips_is_zero() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = sigmoid_distillation(logits, torch.zeros(0, 3), "released")
    assert loss.item() == 0
    loss.backward()


def test_nca_counts_the_clips_own_class_as_the_largest() -> None:
    # The largest logit is 2: the others give e^(1-2) + e^(0-2), and the own class 1 = e^0 whatever it is.
    logits = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0]])
    loss = proxy_nca(logits, torch.tensor([1, 1]))
    first = math.log(1 + math.exp(-1) + math.exp(-2)) - 0
    second = math.log(1 + 1 + math.exp(-2)) + 1
    assert loss.tolist() == pytest.approx([first, second], rel=1e-6)


def test_nca_of_one_class_and_of_no_clips_is_defined() -> None:
    assert proxy_nca(torch.tensor([[-3.0]]), torch.tensor([0])).tolist() == [0.0]
    assert proxy_nca(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_discrepancy_is_the_distance_of_directions_weighted_by_importance() -> None:
    ours = [leaf([[2.0, 0.0]]), leaf([[0.0, 5.0]])]
    theirs = [torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 1.0]])]  # at a right angle, and in the same direction
    loss = feature_discrepancy(ours, theirs, torch.tensor([[3.0, 1.0]]))
    assert loss.item() == pytest.approx(0.75 * math.sqrt(2), rel=1e-6)


def test_equal_features_have_no_discrepancy_and_a_finite_gradient() -> None:
    ours = leaf([[1.0, 2.0], [0.0, 0.0]])
    loss = feature_discrepancy([ours], [ours.detach().clone()], torch.ones(2, 1))
    loss.backward()
    assert loss.item() == 0
    assert ours.grad.isfinite().all()


def test_a_clip_without_importance_adds_nothing() -> None:
    ours = leaf([[1.0, 0.0], [1.0, 0.0]])
    theirs = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    loss = feature_discrepancy([ours], [theirs], torch.tensor([[0.0], [2.0]]))
    assert loss.item() == pytest.approx(math.sqrt(2) / 2, rel=1e-6)


@pytest.mark.parametrize("distance", [5e-4, 5e-5])
def test_a_small_distance_counts_and_has_a_gradient(distance: float) -> None:
    angle = 2 * math.asin(distance / 2)
    ours, theirs = leaf([[math.cos(angle), math.sin(angle)]]), torch.tensor([[1.0, 0.0]])
    loss = feature_discrepancy([ours], [theirs], torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(distance, rel=2e-3)
    assert ours.grad.norm().item() == pytest.approx(1, abs=2e-3)


def test_a_distance_of_rounding_errors_counts_as_none() -> None:
    torch.manual_seed(0)
    ours = torch.randn(100, 8).requires_grad_()
    scaled = (3 * ours).detach()
    lengths = (torch.nn.functional.normalize(ours, dim=1) - torch.nn.functional.normalize(scaled, dim=1)).norm(dim=1)
    assert lengths.max() > 0
    loss = feature_discrepancy([ours], [scaled], torch.ones(100, 1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(ours.grad, torch.zeros_like(ours))
