"""Bias correction of BiC, against a general minimiser, and as weights of the head."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from avcil_dist.config.schema import MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext
from avcil_dist.methods.bic import bias_correction
from avcil_dist.scenario import Scenario

OLD, NEW = 3, 2


def biased(count: int, separation: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels with unequal classes; those of new classes are too large."""
    random = np.random.default_rng(0)
    labels = random.choice(OLD + NEW, count, p=[0.1, 0.3, 0.1, 0.1, 0.4])
    logits = random.normal(size=(count, OLD + NEW)) + separation * np.eye(OLD + NEW)[labels]
    logits[:, OLD:] = 1.7 * logits[:, OLD:] + 2.5
    return logits, labels


def minimum(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    weights = 1 / np.bincount(labels)[labels] / len(np.unique(labels))

    def loss(point: np.ndarray) -> float:
        z = logits.copy()
        z[:, OLD:] = point[0] * z[:, OLD:] + point[1]
        own = z[np.arange(len(z)), labels] - np.log(np.exp(z).sum(axis=1))
        return float(-(weights * own).sum() + 5e-4 * ((point[0] - 1) ** 2 + point[1] ** 2))

    return minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x


@pytest.mark.parametrize("separation", [0.3, 1.0, 40.0])
def test_the_correction_is_the_minimum_of_the_balanced_cross_entropy(separation: float) -> None:
    logits, labels = biased(200, separation)
    found = bias_correction(torch.from_numpy(logits), torch.from_numpy(labels), OLD)
    np.testing.assert_allclose(found, minimum(logits, labels), atol=1e-5)


def test_a_correction_of_unbiased_logits_with_one_new_class_is_finite() -> None:
    logits = torch.eye(2) * 20
    assert all(np.isfinite(bias_correction(logits, torch.tensor([0, 1]), 1)))


def test_the_corrected_head_has_the_corrected_logits_of_new_classes() -> None:
    method = make_method(MethodConfig(name="bic"))
    method.begin_step(StepContext(Scenario((("a", "b", "c"), ("d", "e"))), 1))
    random = torch.Generator().manual_seed(0)
    head, bias, feature = (torch.randn(*shape, generator=random) for shape in ((5, 4), (5,), (7, 4)))
    weights = {"classifier.weight": head, "classifier.bias": bias}
    committed = method.committed_weights(weights, [0.6, -1.5])
    logits = feature @ head.T + bias
    expected = torch.cat([logits[:, :OLD], 0.6 * logits[:, OLD:] - 1.5], dim=1)
    torch.testing.assert_close(feature @ committed["classifier.weight"].T + committed["classifier.bias"], expected)
    torch.testing.assert_close(feature @ head.T + bias, logits)
    assert method.committed_weights(weights, []) == weights
