"""The eager training step in `avcil bench step` has the same loss and gradient as the system."""

import pytest
import torch

from avcil_dist.config.schema import MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext, Targets
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import make_scenario
from launch.bench.eager_reference import EagerNetwork, avcil_loss

CURRENT, REPLAY, OLD, CLASSES, DIM = 3, 2, 4, 6, 8


def test_eager_loss_and_gradient_are_ours() -> None:
    torch.manual_seed(0)
    visual, audio = torch.randn(CURRENT + REPLAY, 2, 5, DIM), torch.randn(CURRENT + REPLAY, DIM)
    labels = torch.tensor([4, 5, 4, 0, 3])
    networks = {}
    for who, num_classes in (("student", CLASSES), ("teacher", OLD)):
        eager, ours = (
            EagerNetwork(DIM, num_classes),
            AudioVisualNetwork(Precomputed(DIM), Precomputed(DIM), num_classes),
        )
        ours.load_state_dict({name: eager.state_dict()[name.removeprefix("attention.")] for name in ours.state_dict()})
        networks[who] = eager, ours
    method = make_method(MethodConfig(name="avcil"))
    method.begin_step(
        StepContext(make_scenario([str(label) for label in range(CLASSES)], classes_per_step=[2, 2, 2]), 2)
    )
    with torch.no_grad():
        eager_teacher, teacher_logits = (
            networks["teacher"][0](visual, audio),
            networks["teacher"][1](visual, audio).logits,
        )
    plain = avcil_loss(
        networks["student"][0](visual, audio),
        eager_teacher,
        labels,
        num_current=CURRENT,
        tasks=[slice(0, 2), slice(2, 4)],
    )
    view = networks["teacher"][1].attention_view(visual[CURRENT:], audio[CURRENT:])[0]
    output = networks["student"][1](visual, audio, view)
    ours = method.loss(Targets(labels, CURRENT), output, Output(teacher_logits, None, None))["loss"]
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    plain.backward()
    ours.backward()
    theirs = dict(networks["student"][0].named_parameters())
    for name, parameter in networks["student"][1].named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name.removeprefix("attention.")].grad, rtol=1e-4, atol=1e-5)
