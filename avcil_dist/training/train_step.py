"""One iteration: a rank's rows forward, the loss of the global batch, backward, the optimizer's step.

A loss here is one of the whole batch: contrast with all of its clips, softmax over the current ones.
So a batch that does not fit at a time cannot be cut into losses of its own. Its outputs are computed
first, in micro-batches and without a graph; the loss gives their gradients; then each micro-batch is
computed again, with a graph that takes its part of those gradients on to the weights. Loss and
gradient are those of the whole batch. Source: gradient caching, Gao et al. 2021 (arXiv 2101.06983).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avcil_dist.data.batch import Batch
from avcil_dist.errors import TrainingError
from avcil_dist.methods.base import Method, Targets
from avcil_dist.models.attention.module import TeacherView
from avcil_dist.models.outputs import Divergence, Output
from avcil_dist.training.collectives import gather_rows
from avcil_dist.training.engine import BETTER_GRADIENT, Engine
from avcil_dist.training.teacher import Teacher


@dataclass(frozen=True)
class StepLosses:
    """The parts of the loss, "loss" the whole of it, and how many clips of the global batch were damaged."""

    parts: dict[str, Tensor]
    num_bad: int


def train_step(
    engine: Engine, batch: Batch, *, method: Method, teacher: Teacher | None, num_bad: int | None = None
) -> StepLosses:
    """Forward on the rank's rows, as many at a time as the engine takes, loss on the global batch, backward, step.

    `num_bad`: as in `gather_batch`. Raises TrainingError when the loss is finite and its gradient is not.
    """
    count = len(batch.labels) // engine.rows
    pass_over = _whole if count == 1 else _in_micro_batches
    done = pass_over(engine, batch, count, _Objective(method, teacher, num_bad))
    moved = engine.step()
    if not moved and engine.network.precision != "fp16" and bool(done.parts["loss"].isfinite()):
        raise TrainingError(f"the gradient is not finite, the loss is; {BETTER_GRADIENT}")
    return done


@dataclass(frozen=True)
class _Objective:
    """What a method's teacher says to a batch, and the method's loss."""

    method: Method
    teacher: Teacher | None
    num_bad: int | None

    def encoded(self, batch: Batch) -> Batch:
        """The batch with all done to it that student and teacher have in common."""
        return self.teacher.encode(batch) if self.teacher else batch

    def view(self, batch: Batch) -> TeacherView | None:
        """What the student's attention is compared with."""
        has_exemplars = batch.num_current < len(batch.labels)
        return (
            self.teacher.attention_view(batch)
            if self.teacher and self.method.needs.divergence and has_exemplars
            else None
        )

    def taught(self, batch: Batch) -> Output | None:
        """The teacher's output."""
        return self.teacher.output(batch, self.method) if self.teacher else None

    def loss(self, batch: Batch, output: Output, taught: Output | None) -> StepLosses:
        """The loss of the global batch, of which a rank gives its rows."""
        gathered = gather_batch(batch, output, taught, num_bad=self.num_bad)
        return StepLosses(self.method.loss(gathered.targets, gathered.output, gathered.teacher), gathered.num_bad)


def _whole(engine: Engine, batch: Batch, _: int, seeing: _Objective) -> StepLosses:
    batch = seeing.encoded(batch)
    output = engine(batch.visual, batch.audio, seeing.view(batch))
    done = seeing.loss(batch, output, seeing.taught(batch))
    engine.backward(done.parts["loss"])
    return done


def _in_micro_batches(engine: Engine, batch: Batch, count: int, seeing: _Objective) -> StepLosses:
    micro_batches = [seeing.encoded(micro) for micro in split(batch, count)]
    leaves, taught, random = [], [], []
    for micro in micro_batches:
        random.append(_random_state(micro.audio.device))
        with torch.no_grad():
            output = engine.network(micro.visual, micro.audio, seeing.view(micro))
        leaves.append(output.map(lambda rows: rows.detach().requires_grad_()))
        taught.append(seeing.taught(micro))
    num_current = micro_batches[0].num_current
    teacher = join([rows for rows in taught if rows], num_current) if seeing.teacher else None
    done = seeing.loss(batch, join(leaves, num_current), teacher)
    done.parts["loss"].backward()
    for number, (micro, leaf) in enumerate(zip(micro_batches, leaves, strict=True)):
        with _replayed(random[number], micro.audio.device):
            output = engine(micro.visual, micro.audio, seeing.view(micro))
        pairs = zip(output.tensors(), leaf.tensors(), strict=True)
        terms = [(rows * cached.grad).sum() for rows, cached in pairs if cached.grad is not None]
        engine.backward(torch.stack(terms).sum(), is_last=number == count - 1)
    return replace(done, parts={name: value.detach() for name, value in done.parts.items()})


def split(batch: Batch, count: int) -> list[Batch]:
    """Equal parts of a rank's batch, each with its share of the current rows and of the exemplars, in their order."""
    current = batch.num_current // count
    replayed = (len(batch.labels) - batch.num_current) // count

    def part(rows: Tensor, number: int) -> Tensor:
        first = rows[number * current : (number + 1) * current]
        start = batch.num_current + number * replayed
        return torch.cat([first, rows[start : start + replayed]]) if replayed else first

    return [
        replace(
            batch,
            visual=part(batch.visual, number),
            audio=part(batch.audio, number),
            labels=part(batch.labels, number),
            valid=part(batch.valid, number),
            num_current=current,
            clips=part(torch.from_numpy(batch.clips), number).numpy(),
        )
        for number in range(count)
    ]


def join(outputs: Sequence[Output], num_current: int) -> Output:
    """The output of a batch from those of its parts, each with `num_current` current rows: the inverse of `split`."""

    def rows(parts: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        ordered = [*(part[:num_current] for part in there), *(part[num_current:] for part in there)]
        return torch.cat(ordered) if there else None

    divergences = [output.divergence for output in outputs if output.divergence]
    logits = rows([output.logits for output in outputs])
    assert logits is not None
    return Output(
        logits=logits,
        audio=rows([output.audio for output in outputs]),
        visual=rows([output.visual for output in outputs]),
        pooled=rows([output.pooled for output in outputs]),
        divergence=Divergence(*map(torch.cat, zip(*divergences, strict=True))) if divergences else None,
        importance=rows([output.importance for output in outputs]),
    )


def _random_state(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@contextmanager
def _replayed(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """A block that draws the random numbers that were drawn after `state`, and leaves no mark: dropout repeats."""
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_device):
        torch.set_rng_state(state[0])
        for own, generator in zip(on_device, state[1:], strict=True):
            torch.cuda.set_rng_state(generator, own)
        yield


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks' rows gave together, in the plan's order, without the rows of damaged clips."""

    targets: Targets
    output: Output
    teacher: Output | None
    num_bad: int


def gather_batch(batch: Batch, output: Output, teacher: Output | None, *, num_bad: int | None = None) -> GlobalBatch:
    """Gather a rank's rows with those of the others, with gradient; equal on all ranks.

    `num_bad` rows of the global batch are damaged, where that is known: if none are, nothing waits for the device.
    Pooled pictures are only compared with a teacher's, so without those they stay where they are.
    """
    valid = gather_rows(batch.valid, batch.num_current)
    num_current = len(valid) * batch.num_current // len(batch.valid)

    if num_bad is None:
        num_bad = int((~valid).sum())

    def good(rows: Tensor, valid: Tensor) -> Tensor:
        return rows[valid] if num_bad else rows

    def gather(rows: Tensor) -> Tensor:
        return good(gather_rows(rows, batch.num_current), valid)

    def gather_present(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else gather(rows)

    def gather_exemplars(rows: Tensor) -> Tensor:
        return good(gather_rows(rows, len(rows)), valid[num_current:])

    def gather_output(rows: Output, *, with_pooled: bool) -> Output:
        divergence = rows.divergence and Divergence(
            gather_exemplars(rows.divergence.spatial), gather_exemplars(rows.divergence.temporal)
        )
        return Output(
            logits=gather(rows.logits),
            audio=gather_present(rows.audio),
            visual=gather_present(rows.visual),
            pooled=gather_present(rows.pooled) if with_pooled else None,
            divergence=divergence,
            importance=gather_present(rows.importance),
        )

    with_pooled = teacher is not None and teacher.pooled is not None
    return GlobalBatch(
        targets=Targets(gather(batch.labels), int(valid[:num_current].sum()) if num_bad else num_current),
        output=gather_output(output, with_pooled=with_pooled),
        teacher=None if teacher is None else gather_output(teacher, with_pooled=with_pooled),
        num_bad=num_bad,
    )
