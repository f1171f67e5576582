"""Loss by a graph. Without a GPU, `capture` is replaced by a function that runs the same code again."""

from unittest import mock

import pytest
import torch

from avcil_dist.config.schema import MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext, Targets
from avcil_dist.models.outputs import Divergence, Output
from avcil_dist.scenario import make_scenario
from avcil_dist.training import loss_graph
from avcil_dist.training.loss_graph import LossGraph, method_loss

OLD, CLASSES, CURRENT, EXEMPLARS, DIM = 4, 6, 5, 3, 7


@pytest.fixture
def method() -> Method:
    made = make_method(MethodConfig(name="avcil"))
    made.begin_step(StepContext(make_scenario([str(label) for label in range(CLASSES)], classes_per_step=[2, 2, 2]), 2))
    return made


def drawn(seed: int) -> tuple[Targets, Output, Output]:
    """A batch, the student's output and the teacher's."""
    random = torch.Generator().manual_seed(seed)
    clips = CURRENT + EXEMPLARS

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).requires_grad_()

    labels = [
        torch.randint(OLD, CLASSES, (CURRENT,), generator=random),
        torch.randint(0, OLD, (EXEMPLARS,), generator=random),
    ]
    divergence = Divergence(leaf(EXEMPLARS), leaf(EXEMPLARS))
    output = Output(leaf(clips, CLASSES), leaf(clips, DIM), leaf(clips, DIM), divergence=divergence)
    return Targets(torch.cat(labels), CURRENT), output, Output(leaf(clips, OLD).detach(), None, None)


def gradients(loss: torch.Tensor, output: Output) -> list[torch.Tensor]:
    return list(torch.autograd.grad(4 * loss, output.tensors()))


def test_every_batch_has_the_loss_and_gradient_of_the_method_to_the_last_bit(method: Method) -> None:
    with mock.patch.object(loss_graph, "capture", lambda compute: compute):
        graph = LossGraph(method, *drawn(0))
    for seed in (0, 1, 2):
        targets, output, teacher = drawn(seed)
        expected, found = method.loss(targets, output, teacher), graph(targets, output, teacher)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(map(torch.equal, gradients(found["loss"], output), gradients(expected["loss"], output)))


def test_backward_after_the_next_batch_is_an_error(method: Method) -> None:
    with mock.patch.object(loss_graph, "capture", lambda compute: compute):
        graph = LossGraph(method, *drawn(0))
    loss = graph(*drawn(0))["loss"]
    graph(*drawn(1))
    with pytest.raises(RuntimeError, match="before this one's backward"):
        loss.backward()


def test_on_a_cpu_the_loss_is_that_of_the_method(method: Method) -> None:
    targets, output, teacher = drawn(0)
    with mock.patch.object(loss_graph, "LossGraph", side_effect=AssertionError):
        assert torch.equal(
            method_loss(method, targets, output, teacher)["loss"], method.loss(targets, output, teacher)["loss"]
        )
