"""FOSTER's network with a booster and its losses, against numpy."""

import numpy as np
import pytest
import torch

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig, MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext, Targets
from avcil_dist.methods.foster import class_weights
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario

SCENARIO = Scenario((("a", "b"), ("c", "d", "e"), ("f",)))
LABELS = np.array([5, 0, 3, 5, 1])
COUNTS = np.array([6.0, 4.0, 0.5, 3.0, 5.0, 40.0])  # of an epoch; less than a clip counts as one
VISUAL, SOUND = torch.arange(120.0).reshape(5, 2, 3, 4).sin(), torch.arange(20.0).reshape(5, 4).cos()


def network(modality: str = "both", step: int = 0) -> HeadedNetwork:
    torch.manual_seed(step)
    features = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}, "modality": modality}
    made = build_network(
        ModelConfig.model_validate(features),
        ClipConfig(),
        {"frames": 2, "positions": 3, "dim": 4},
        SCENARIO.num_seen(step),
        network_spec=NetworkSpec(booster=True),
        num_frozen=SCENARIO.num_old(step),
        num_earlier=step,
    )
    assert isinstance(made, HeadedNetwork)
    return made


def probabilities(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def weights_of(beta: float) -> np.ndarray:
    """As in Cui et al. 2019, with a mean of 1."""
    inverse = (1 - beta) / (1 - beta ** np.maximum(COUNTS, 1))
    return inverse / inverse.mean()


@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_losses_are_those_of_the_formulas(modality: str) -> None:
    made, teacher = network(modality, step=2), torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    output = made(VISUAL, SOUND)
    state = {name: value.numpy() for name, value in made.state_dict().items()}
    inputs = SOUND.numpy() if modality == "audio" else VISUAL.numpy().mean(axis=(1, 2))

    def layer(at: str, values: np.ndarray) -> np.ndarray:
        return values @ state[f"{at}.weight"].T + state[f"{at}.bias"]

    feature = np.maximum(layer(f"booster.layers.{modality}_proj", inputs), 0)
    boosted = layer("booster.residual", feature) + np.pad(teacher.numpy(), ((0, 0), (0, 1)))
    own, temperature, rows = layer("booster.own", feature), 3.0, range(5)

    method = make_method(
        MethodConfig.model_validate(
            {
                "name": "foster",
                "distillation_temperature": temperature,
                "lambda_distillation": 0.7,
                "beta_boosting": 0.9,
                "beta_compression": 0.8,
            }
        )
    )
    method.begin_step(StepContext(SCENARIO, 2))
    method.begin_training(torch.from_numpy(COUNTS / 4), 4)
    losses = method.loss(Targets(torch.from_numpy(LABELS), 5), output, Output(teacher))

    soft = probabilities(teacher.numpy() / temperature)
    target = probabilities(boosted / temperature) * weights_of(0.8)
    target /= target.sum(axis=1, keepdims=True)
    student = output.logits.detach().numpy()
    expected = {
        "boosting": -np.log(probabilities(boosted / weights_of(0.9)))[rows, LABELS].mean(),
        "enhancement": -np.log(probabilities(own))[rows, LABELS].mean(),
        "distillation": -(soft * np.log(probabilities(boosted[:, :5] / temperature))).sum(axis=1).mean(),
        "compression": -(target * np.log(probabilities(student / temperature))).sum(axis=1).mean(),
    }
    expected["loss"] = sum(expected.values()) - 0.3 * expected["distillation"]
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_compression_trains_the_network_and_leaves_the_booster() -> None:
    made = network(step=2)
    method = make_method(MethodConfig.model_validate({"name": "foster"}))
    method.begin_step(StepContext(SCENARIO, 2))
    method.begin_training(torch.from_numpy(COUNTS), 1)
    losses = method.loss(Targets(torch.from_numpy(LABELS), 5), made(VISUAL, SOUND), Output(torch.zeros(5, 5)))
    losses["compression"].backward()
    trained = {name.partition(".")[0] for name, value in made.named_parameters() if value.grad is not None}
    assert trained == {"attention", "audio_proj", "visual_proj", "classifier"}


def test_a_balance_of_zero_weights_all_classes_alike() -> None:
    assert torch.equal(class_weights(torch.tensor([1.0, 50.0]), 0.0), torch.ones(2))


@pytest.mark.parametrize("modality", ["both", "audio", "visual"])
def test_each_step_has_a_new_booster_that_begins_as_a_copy(modality: str) -> None:
    made = network(modality)
    assert made(VISUAL, SOUND).auxiliary is None
    for step in (1, 2):
        with torch.no_grad():
            for layer in made.projections.values():
                layer.weight += torch.randn_like(layer.weight)
        made.grow(SCENARIO.num_seen(step))
        assert made.booster is not None
        for name, layer in made.projections.items():
            assert torch.equal(made.booster.layers[name].weight, layer.weight)
    loaded = network(modality, step=2)
    loaded.load_state_dict(made.state_dict())
    output = made(VISUAL, SOUND)
    assert all(map(torch.equal, output.tensors(), loaded(VISUAL, SOUND).tensors()))
    assert output.auxiliary is not None
    assert output.auxiliary.shape == (5, 12)
    made.eval()
    assert made(VISUAL, SOUND).auxiliary is None  # the booster is for training alone
