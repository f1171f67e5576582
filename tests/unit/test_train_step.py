"""Training step on one rank: micro-batches give the loss and the gradient of the whole batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avcil_dist.config.schema import MethodConfig
from avcil_dist.data.batch import Batch
from avcil_dist.errors import TrainingError
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.encoders.base import Encoder, Precomputed
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.models.outputs import Divergence, Output
from avcil_dist.scenario import Scenario
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.train_step import StepLosses, gather_batch, split, train_step

pytestmark = pytest.mark.usefixtures("one_rank")

CPU, DIM, CURRENT, EXEMPLARS = torch.device("cpu"), 6, 8, 4
SCENARIO = Scenario((("a", "b", "c"), ("d", "e")))


class EngineInOneProcess:
    """An engine's part in a training step: forward, backward, and whether the update was made."""

    def __init__(self, network: AudioVisualNetwork, rows: int, is_updated: bool = True) -> None:
        self.network, self.rows, self.is_updated = network, rows, is_updated
        self.last: list[bool] = []
        self.num_steps = 0

    def __call__(self, *inputs: Any) -> Output:
        return self.network(*inputs)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        self.last.append(is_last)
        loss.backward()

    def step(self, *, with_norm: bool = False) -> bool:
        self.num_steps += 1
        return self.is_updated


class Dropping(Encoder):
    """An encoder that draws random numbers."""

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.dropout(features, 0.5, self.training)


def make_network(num_classes: int, *, drops: bool = False) -> AudioVisualNetwork:
    torch.manual_seed(num_classes)
    audio = Dropping(DIM) if drops else Precomputed(DIM)
    return AudioVisualNetwork(Precomputed(DIM), audio, num_classes).train()


def make_batch() -> Batch:
    random = torch.Generator().manual_seed(5)
    rows = CURRENT + EXEMPLARS
    return Batch(
        visual=torch.randn(rows, 2, 3, DIM, generator=random),
        audio=torch.randn(rows, DIM, generator=random),
        labels=torch.tensor([3, 4, 4, 3, 4, 3, 3, 3, 0, 1, 2, 0]),
        valid=torch.ones(rows, dtype=torch.bool),
        num_current=CURRENT,
        clips=np.arange(100, 100 + rows),
    )


def avcil() -> Method:
    method = make_method(MethodConfig(name="avcil"))
    method.begin_step(StepContext(SCENARIO, 1))
    return method


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """By name, of every parameter."""
    found = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def run(engine: EngineInOneProcess, batch: Batch, teacher: Teacher | None, **settings: Any) -> StepLosses:
    return train_step(engine, batch, method=avcil(), teacher=teacher, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("damaged", [[], [1, CURRENT + 3]])
def test_micro_batches_give_the_loss_and_the_gradient_of_the_whole_batch(count: int, damaged: list[int]) -> None:
    batch, teacher = make_batch(), Teacher(make_network(3), CPU)
    batch.valid[damaged] = False
    found = []
    for rows in (len(batch.labels), len(batch.labels) // count):
        engine = EngineInOneProcess(make_network(5), rows)
        losses = run(engine, batch, teacher)
        assert losses.num_bad == len(damaged)
        assert engine.num_steps == 1
        assert engine.last == [False] * (len(batch.labels) // rows - 1) + [True]
        found.append((losses, gradients(engine.network)))
    (whole, of_whole), (parts, of_parts) = found
    assert {"separated_softmax", "task_distillation", "instance", "class_aware", "attention", "loss"} == set(
        whole.parts
    )
    assert parts.parts.keys() == whole.parts.keys()
    for name, value in whole.parts.items():
        assert parts.parts[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
        assert not parts.parts[name].requires_grad
    for name, gradient in of_whole.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(of_parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_network_that_draws_random_numbers_draws_the_same_in_both_forward_passes() -> None:
    batch, method, count = make_batch(), avcil(), 2
    expected, engine = make_network(5, drops=True), EngineInOneProcess(make_network(5, drops=True), 6)
    torch.manual_seed(9)
    micro_batches = split(batch, count)
    outputs = [expected(micro.visual, micro.audio) for micro in micro_batches]
    after = torch.get_rng_state()
    gathered = gather_batch(batch, Output.cat(outputs, CURRENT // count), Output(torch.zeros(12, 3)))
    loss = method.loss(gathered.targets, gathered.output, gathered.teacher)["loss"]
    loss.backward()

    class Zeros:
        """A teacher with logits of 0, and no attention."""

        def encode_shared(self, rows: Batch) -> Batch:
            return rows

        def attention_view(self, _: Batch) -> None:
            return None

        def output(self, rows: Batch, _: Method) -> Output:
            return Output(torch.zeros(len(rows.labels), 3))

    torch.manual_seed(9)
    losses = run(engine, batch, Zeros())  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), after)
    assert losses.parts["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(engine.network)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_is_split_into_equal_parts_with_current_rows_first() -> None:
    batch = make_batch()
    parts = split(batch, 4)
    rows = [[0, 1, 8], [2, 3, 9], [4, 5, 10], [6, 7, 11]]
    for part, expected in zip(parts, rows, strict=True):
        assert part.num_current == 2
        assert part.clips.tolist() == [100 + row for row in expected]
        for own, whole in zip(part.tensors, batch.tensors, strict=True):
            assert torch.equal(own, whole[expected])
    alone = replace(batch, num_current=len(batch.labels))
    assert [part.clips.tolist() for part in split(alone, 3)] == [[*range(100 + n, 104 + n)] for n in (0, 4, 8)]


def test_outputs_of_parts_are_put_together_in_the_order_of_the_batch() -> None:
    batch = make_batch()
    outputs = [Output(part.audio) for part in split(batch, 4)]
    assert torch.equal(Output.cat(outputs, CURRENT // 4).logits, batch.audio)


@pytest.mark.parametrize("rows", [12, 6])
def test_a_gradient_that_is_not_finite_is_an_error_where_the_loss_is_finite(rows: int) -> None:
    batch, teacher = make_batch(), Teacher(make_network(3), CPU)
    engine = EngineInOneProcess(make_network(5), rows, is_updated=False)
    with pytest.raises(TrainingError, match=r"the gradient is not finite, the loss is; lower optim\.lr"):
        run(engine, batch, teacher)
    engine.network.precision = "fp16"  # there the loss scale is lowered instead
    losses = train_step(engine, _without_teacher(batch), method=avcil(), teacher=None)  # type: ignore[arg-type]
    assert losses.parts["loss"].isfinite()


def test_a_loss_that_is_not_finite_is_returned() -> None:
    engine = EngineInOneProcess(make_network(5), 12, is_updated=False)
    batch = _without_teacher(make_batch())
    batch.audio[0] = torch.inf
    assert not train_step(engine, batch, method=avcil(), teacher=None).parts["loss"].isfinite()  # type: ignore[arg-type]


def _without_teacher(batch: Batch) -> Batch:
    return replace(batch, num_current=len(batch.labels))


@pytest.mark.parametrize("num_bad", [None, 2])
def test_damaged_rows_are_left_out_of_all_tensors(num_bad: int | None) -> None:
    batch = make_batch()
    batch.valid[[1, CURRENT + 2]] = False
    good = [row for row in range(12) if row not in (1, CURRENT + 2)]
    divergence = Divergence(torch.arange(4.0), 10 + torch.arange(4.0))
    output = Output(torch.randn(12, 5), torch.randn(12, DIM), torch.randn(12, DIM), torch.randn(12, DIM), divergence)
    teacher = Output(torch.randn(12, 3), pooled=torch.randn(12, DIM), importance=torch.rand(12, 3))
    gathered = gather_batch(batch, output, teacher, num_bad=num_bad)
    assert gathered.num_bad == 2
    assert gathered.targets.num_current == CURRENT - 1
    assert torch.equal(gathered.targets.labels, batch.labels[good])
    assert [part.tolist() for part in gathered.output.divergence] == [[0, 1, 3], [10, 11, 13]]
    for name in ("logits", "audio", "visual", "pooled"):
        assert torch.equal(getattr(gathered.output, name), getattr(output, name)[good])
    for name in ("logits", "pooled", "importance"):
        assert torch.equal(getattr(gathered.teacher, name), getattr(teacher, name)[good])


def test_pooled_features_are_gathered_only_for_a_teacher_that_has_them() -> None:
    batch, rows = make_batch(), torch.randn(12, DIM)
    output = Output(rows, rows, rows, rows)
    assert gather_batch(batch, output, None).output.pooled is None
    without = gather_batch(batch, output, Output(rows))
    assert without.output.pooled is None
    assert without.output.audio is not None
    assert gather_batch(batch, output, Output(rows, pooled=rows)).output.pooled is not None
    whole = gather_batch(batch, output, None)
    assert (whole.num_bad, whole.targets.num_current, whole.teacher) == (0, CURRENT, None)


def test_attention_is_compared_only_where_the_batch_has_exemplars_and_the_method_needs_it() -> None:
    batch, teacher = make_batch(), Teacher(make_network(3), CPU)
    seen: list[object] = []

    class Watching(EngineInOneProcess):
        def __call__(self, *inputs: Any) -> Output:
            seen.append(inputs[2])
            return super().__call__(*inputs)

    run(Watching(make_network(5), 12), batch, teacher)
    run(Watching(make_network(5), 12), _without_teacher(replace(batch, labels=batch.labels.clamp(3))), teacher)
    ssil = make_method(MethodConfig(name="ssil"))
    ssil.begin_step(StepContext(SCENARIO, 1))
    train_step(Watching(make_network(5), 12), batch, method=ssil, teacher=teacher)  # type: ignore[arg-type]
    assert [view is not None for view in seen] == [True, False, False]
