"""One iteration: a rank's rows forward, the loss of the global batch, backward, the optimizer's step."""

from dataclasses import dataclass

from torch import Tensor

from avcil_dist.data.loader import Batch
from avcil_dist.methods.base import Method, Targets
from avcil_dist.models.outputs import Divergence, Output
from avcil_dist.training.distributed import gather_rows
from avcil_dist.training.engine import Engine
from avcil_dist.training.teacher import Teacher


@dataclass(frozen=True)
class Iterated:
    """The parts of the loss, "loss" the whole of it, and how many clips of the global batch were damaged."""

    parts: dict[str, Tensor]
    num_bad: int


def iterate(engine: Engine, batch: Batch, *, method: Method, teacher: Teacher | None) -> Iterated:
    """Forward on the rank's rows, loss on the global batch, backward, step."""
    has_exemplars = batch.num_current < len(batch.labels)
    view = teacher.view(batch) if teacher and method.needs.divergence and has_exemplars else None
    output = engine(batch.visual, batch.audio, view)
    taught = teacher.output(batch, method) if teacher else None
    gathered = gather_batch(batch, output, taught)
    parts = method.loss(gathered.targets, gathered.output, gathered.teacher)
    engine.backward(parts["loss"])
    engine.step()
    return Iterated(parts, gathered.num_bad)


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks' rows gave together, in the plan's order, without the rows of damaged clips."""

    targets: Targets
    output: Output
    teacher: Output | None
    num_bad: int


def gather_batch(batch: Batch, output: Output, teacher: Output | None) -> GlobalBatch:
    """Gather a rank's rows with those of the others, with gradient; equal on all ranks.

    Pooled pictures are only compared with a teacher's, so without those they stay where they are.
    """
    valid = gather_rows(batch.valid, batch.num_current)
    num_current = len(valid) * batch.num_current // len(batch.valid)

    def gather(rows: Tensor) -> Tensor:
        return gather_rows(rows, batch.num_current)[valid]

    def gather_present(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else gather(rows)

    def gather_exemplars(rows: Tensor) -> Tensor:
        return gather_rows(rows, len(rows))[valid[num_current:]]

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
        targets=Targets(gather(batch.labels), int(valid[:num_current].sum())),
        output=gather_output(output, with_pooled=with_pooled),
        teacher=None if teacher is None else gather_output(teacher, with_pooled=with_pooled),
        num_bad=int((~valid).sum()),
    )
