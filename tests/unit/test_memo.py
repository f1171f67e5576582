"""MEMO's network of branches and its loss, against numpy."""

import numpy as np
import pytest
import torch

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig, MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext, Targets
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.scenario import Scenario

SCENARIO = Scenario((("a", "b"), ("c", "d", "e"), ("f",)))
SHAPE = {"frames": 2, "positions": 3, "dim": 4}
TRAINING, FREEZING = NetworkSpec(branches=True), NetworkSpec(branches=True, freeze_shared=True)


def network(modality: str = "both", spec: NetworkSpec = TRAINING, step: int = 0) -> HeadedNetwork:
    torch.manual_seed(step)
    features = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}, "modality": modality}
    made = build_network(
        ModelConfig.model_validate(features),
        ClipConfig(),
        SHAPE,
        SCENARIO.num_seen(step),
        network_spec=spec,
        num_frozen=SCENARIO.num_old(step),
        num_earlier=step,
    )
    assert isinstance(made, HeadedNetwork)
    return made


def grown(modality: str = "both", spec: NetworkSpec = TRAINING) -> HeadedNetwork:
    """A network of three steps, whose projections have moved in each."""
    made = network(modality, spec)
    for step in (1, 2):
        with torch.no_grad():
            for layer in made.projections.values():
                layer.weight += torch.randn_like(layer.weight)
        made.grow(SCENARIO.num_seen(step))
    return made


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_logits_and_loss_are_those_of_the_formula(modality: str) -> None:
    made, alpha = grown(modality), 0.3
    visual, sound, labels = torch.randn(5, 2, 3, 4), torch.randn(5, 4), np.array([5, 0, 3, 5, 1])
    output = made(visual, sound)
    state = {name: value.numpy() for name, value in made.state_dict().items()}
    inputs = sound.numpy() if modality == "audio" else visual.numpy().mean(axis=(1, 2))
    places = [f"branches.earlier.{step}.{modality}_proj" for step in (0, 1)] + [f"{modality}_proj"]
    blocks = [np.maximum(inputs @ state[f"{at}.weight"].T + state[f"{at}.bias"], 0) for at in places]
    logits = np.concatenate(blocks, axis=1) @ state["classifier.weight"].T + state["classifier.bias"]
    np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-5)
    np.testing.assert_allclose(output.feature.detach().numpy(), np.concatenate(blocks, axis=1), atol=1e-5)

    method = make_method(MethodConfig.model_validate({"name": "memo", "lambda_auxiliary": alpha}))
    method.begin_step(StepContext(SCENARIO, 2))
    losses = method.loss(Targets(torch.from_numpy(labels), 5), output, None)
    own = blocks[-1] @ state["branches.auxiliary.weight"].T + state["branches.auxiliary.bias"]
    assert own.shape == (5, 2)  # all old classes together, and the new one
    cross = -log_softmax(logits)[range(5), labels].mean()
    auxiliary = -log_softmax(own)[range(5), (labels == 5).astype(int)].mean()
    expected = {"loss": cross + alpha * auxiliary, "cross_entropy": cross, "auxiliary": auxiliary}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_a_new_branch_begins_as_a_copy_and_old_weights_of_the_head_stay() -> None:
    made = network()
    old_head, old = made.classifier.weight.detach().clone(), made.audio_proj.weight.detach().clone()
    made.grow(SCENARIO.num_seen(1))
    assert made.classifier.weight.shape == (5, 8)
    assert torch.equal(made.classifier.weight[:2, :4], old_head)
    assert made.branches is not None
    assert torch.equal(made.branches.earlier[0]["audio_proj"].weight, old)
    assert torch.equal(made.audio_proj.weight, old)
    assert made.branches.auxiliary is not None
    assert made.branches.auxiliary.num_classes == 1 + 3


@pytest.mark.parametrize(("spec", "shared"), [(TRAINING, True), (FREEZING, False)])
def test_earlier_branches_are_frozen_and_shared_layers_by_choice(spec: NetworkSpec, shared: bool) -> None:
    made = grown(spec=spec)
    trained = {name.rpartition(".")[0] for name, value in made.named_parameters() if value.requires_grad}
    own = {"audio_proj", "visual_proj", "classifier", "branches.auxiliary"}
    assert trained == own | ({"attention.attn_audio", "attention.attn_visual"} if shared else set())


@pytest.mark.parametrize("modality", ["both", "audio", "visual"])
def test_a_network_of_a_step_has_the_shape_of_a_grown_one(modality: str) -> None:
    made, expected = network(modality, step=2), grown(modality)
    made.load_state_dict(expected.state_dict())
    visual, sound = torch.randn(5, 2, 3, 4), torch.randn(5, 4)
    assert all(map(torch.equal, made(visual, sound).tensors(), expected(visual, sound).tensors()))
