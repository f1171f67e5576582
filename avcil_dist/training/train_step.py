"""Training step: forward on a rank's rows, the loss of the global batch, backward, the optimizer's update.

The loss couples all clips of the global batch (contrastive terms, softmax over the current clips), so accumulating the
gradients of the losses of parts would be wrong. A batch that does not fit into memory uses gradient caching (Gao et al.
2021, arXiv 2101.06983). The outputs of all micro-batches are computed without a graph. The loss of the whole batch
gives the gradient of each output. Then each micro-batch is computed again with a graph, and its part of those
gradients is propagated to the weights. Loss and gradient are those of the whole batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from avcil_dist.data.batch import Batch
from avcil_dist.errors import TrainingError
from avcil_dist.methods.base import Method, StoredLogits, Targets
from avcil_dist.models.attention.module import TeacherView
from avcil_dist.models.outputs import Output
from avcil_dist.training.collectives import gather_rows
from avcil_dist.training.engine import BETTER_GRADIENT, Engine
from avcil_dist.training.exemplar_logits import StoredRows
from avcil_dist.training.loss_graph import method_loss
from avcil_dist.training.teacher import Teacher


@dataclass(frozen=True)
class StepLosses:
    """Loss terms of a training step by name, with the total as "loss", and the global batch's damaged clips."""

    parts: dict[str, Tensor]
    num_bad: int


def train_step(
    engine: Engine,
    batch: Batch,
    *,
    method: Method,
    teacher: Teacher | None,
    stored: StoredRows | None = None,
    num_bad: int | None = None,
    with_norm: bool = False,
) -> StepLosses:
    """Run forward, backward and the optimizer's update; in micro-batches of `engine.rows` rows if there are more.

    `stored` are the logits of exemplars that the method needs, if it does. `num_bad` is as in `gather_batch`,
    `with_norm` as in `Engine.step`. Raises TrainingError when the loss is finite but its gradient is not.
    """
    num_micro_batches = len(batch.labels) // engine.rows
    objective = _Objective(method, teacher, stored, num_bad)
    if num_micro_batches == 1:
        losses = _backward_whole(engine, batch, objective)
    else:
        losses = _backward_in_micro_batches(engine, batch, num_micro_batches, objective)
    is_updated = engine.step(with_norm=with_norm)
    if not is_updated and engine.network.precision != "fp16" and bool(losses.parts["loss"].isfinite()):
        raise TrainingError(f"the gradient is not finite, the loss is; {BETTER_GRADIENT}")
    return losses


@dataclass(frozen=True)
class _Objective:
    """Teacher outputs for a batch, and the method's loss."""

    method: Method
    teacher: Teacher | None
    stored: StoredRows | None
    num_bad: int | None

    def encode_shared(self, batch: Batch) -> Batch:
        """Run the encoders that student and teacher share, if there is a teacher."""
        return self.teacher.encode_shared(batch) if self.teacher else batch

    def attention_view(self, batch: Batch) -> TeacherView | None:
        """The teacher's side of the attention distillation, if the method has one and the batch has exemplars."""
        has_exemplars = batch.num_current < len(batch.labels)
        if self.teacher is None or not self.method.needs.divergence or not has_exemplars:
            return None
        return self.teacher.attention_view(batch)

    def teacher_output(self, batch: Batch) -> Output | None:
        """The teacher's output, if there is a teacher."""
        return self.teacher.output(batch, self.method) if self.teacher else None

    def loss(self, batch: Batch, output: Output, teacher_output: Output | None) -> StepLosses:
        """The loss of the global batch, from this rank's rows and those of the others."""
        gathered = gather_batch(batch, output, teacher_output, stored=self.stored, num_bad=self.num_bad)
        inputs = gathered.targets, gathered.output, gathered.teacher
        parts = self.method.loss(*inputs) if gathered.num_bad else method_loss(self.method, *inputs)
        return StepLosses(parts, gathered.num_bad)


def _backward_whole(engine: Engine, batch: Batch, objective: _Objective) -> StepLosses:
    batch = objective.encode_shared(batch)
    output = engine(batch.visual, batch.audio, objective.attention_view(batch))
    losses = objective.loss(batch, output, objective.teacher_output(batch))
    engine.backward(losses.parts["loss"])
    return losses


def _backward_in_micro_batches(engine: Engine, batch: Batch, count: int, objective: _Objective) -> StepLosses:
    micro_batches = [objective.encode_shared(micro) for micro in split(batch, count)]
    num_current = micro_batches[0].num_current
    leaves, teacher_outputs, random_states = [], [], []
    for micro in micro_batches:
        random_states.append(_random_state(micro.audio.device))
        with torch.no_grad():
            output = engine.network(micro.visual, micro.audio, objective.attention_view(micro))
        leaves.append(output.map(lambda rows: rows.detach().requires_grad_()))
        teacher_outputs.append(objective.teacher_output(micro))
    of_teacher = [output for output in teacher_outputs if output is not None]
    losses = objective.loss(
        batch, Output.cat(leaves, num_current), Output.cat(of_teacher, num_current) if of_teacher else None
    )
    losses.parts["loss"].backward()
    for number, (micro, leaf) in enumerate(zip(micro_batches, leaves, strict=True)):
        with _replayed(random_states[number], micro.audio.device):
            output = engine(micro.visual, micro.audio, objective.attention_view(micro))
        pairs = zip(output.tensors(), leaf.tensors(), strict=True)
        # The gradient of Σ output · dL/doutput with respect to the weights is that of the loss.
        terms = [(rows * cached.grad).sum() for rows, cached in pairs if cached.grad is not None]
        engine.backward(torch.stack(terms).sum(), is_last=number == count - 1)
    return replace(losses, parts={name: value.detach() for name, value in losses.parts.items()})


def split(batch: Batch, count: int) -> list[Batch]:
    """Split a rank's batch into equal parts, each with its share of the current rows and of the exemplars, in order.

    `Output.cat` puts the outputs of the parts together again.
    """
    num_current = batch.num_current // count
    num_exemplars = (len(batch.labels) - batch.num_current) // count

    def part(rows: Tensor, number: int) -> Tensor:
        current = rows[number * num_current : (number + 1) * num_current]
        first_exemplar = batch.num_current + number * num_exemplars
        return torch.cat([current, rows[first_exemplar : first_exemplar + num_exemplars]]) if num_exemplars else current

    return [
        replace(
            batch.map(partial(part, number=number)),
            num_current=num_current,
            clips=part(torch.from_numpy(batch.clips), number).numpy(),
        )
        for number in range(count)
    ]


def _random_state(device: torch.device) -> list[Tensor]:
    """State of torch's generators on the CPU and on the device."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@contextmanager
def _replayed(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw the random numbers that follow `state` in the block, and restore the generators after it.

    So dropout has the same masks in both forward passes of a micro-batch.
    """
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_device):
        torch.set_rng_state(state[0])
        for own, generator in zip(on_device, state[1:], strict=True):
            torch.cuda.set_rng_state(generator, own)
        yield


@dataclass(frozen=True)
class GlobalBatch:
    """Rows of all ranks in the plan's order, without those of damaged clips."""

    targets: Targets
    output: Output
    teacher: Output | None
    num_bad: int


def gather_batch(
    batch: Batch,
    output: Output,
    teacher: Output | None,
    *,
    stored: StoredRows | None = None,
    num_bad: int | None = None,
) -> GlobalBatch:
    """Gather the rows of all ranks, with gradient. Equal on all ranks.

    `num_bad` is the number of damaged rows in the global batch, if known: if it is 0, the CPU does not wait for the
    device. `pooled` is gathered only if the teacher has it too, because it is used only in comparison with it.
    """
    valid = gather_rows(batch.valid, batch.num_current)
    num_current = len(valid) * batch.num_current // len(batch.valid)
    if num_bad is None:
        num_bad = int((~valid).sum())

    def gather(rows: Tensor) -> Tensor:
        gathered = gather_rows(rows, batch.num_current)
        return gathered[valid] if num_bad else gathered

    def gather_exemplars(rows: Tensor) -> Tensor:
        gathered = gather_rows(rows, len(rows))
        return gathered[valid[num_current:]] if num_bad else gathered

    if teacher is None or teacher.pooled is None:
        output = output._replace(pooled=None)
    return GlobalBatch(
        targets=Targets(
            gather(batch.labels),
            int(valid[:num_current].sum()) if num_bad else num_current,
            None if stored is None else _stored_logits(*map(gather, stored.lookup(batch.clips, batch.labels.device))),
        ),
        output=output.map(gather, gather_exemplars),
        teacher=None if teacher is None else teacher.map(gather, gather_exemplars),
        num_bad=num_bad,
    )


def _stored_logits(values: Tensor, counts: Tensor) -> StoredLogits:
    """Logits (B, C) whose first `counts` (B,) classes are known."""
    return StoredLogits(values, torch.arange(values.shape[1], device=values.device) < counts[:, None])
