"""Closed-form training: one pass over the step's clips, statistics summed over ranks, a solution without gradients."""

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.methods.base import ClosedFormMethod
from avcil_dist.models.network import HeadedNetwork, Network
from avcil_dist.training.collectives import GroupRanks, gather_rows
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass


def solve_from_sums(step: Step, method: ClosedFormMethod, network: Network, inference: InferencePass) -> Tensor:
    """Accumulate the training clips of the step, and return the method's candidates. Equal on all ranks."""
    method.begin_sums({label: len(step.manifest.clips([name], "train")) for label, name in _new_labels(step)})
    for batch, output in inference.run(network, step.current_clips):
        labels, valid = batch.labels, batch.valid
        if method.gathers:
            output = output.map(_of_all_ranks)
            labels, valid = _of_all_ranks(labels), _of_all_ranks(valid)
        method.accumulate(output.select(valid), labels[valid])
    for total in method.statistics():
        dist.all_reduce(total)
    return method.solve_together(GroupRanks(step.device))


def solve_anchor(step: Step, student: Network, inference: InferencePass) -> None:
    """Solve the anchor of the step's method from the training clips so far, and set it in the student."""
    assert isinstance(student, HeadedNetwork)
    method, anchor = step.method.anchor, student.anchor
    assert method is not None
    assert anchor is not None
    network = student.tokens_of_anchor()
    network.precision = student.precision
    method.choose(solve_from_sums(step, method, network, inference), [])
    anchor.set_weights(step.method.anchor_weights())


def train_closed_form(
    step: Step, network: Network, inference: InferencePass, message: Callable[[str], None] = lambda text: None
) -> float | None:
    """Accumulate the training clips of the step, solve, and choose the solution on validation clips.

    The step's method is a ClosedFormMethod; its remark, if there is one, is passed to `message`. Returns the accuracy
    on the validation clips of all seen classes; None where there are none.
    """
    method = cast(ClosedFormMethod, step.method)
    candidates = solve_from_sums(step, method, network, inference)
    if method.remark:
        message(method.remark)
    validation = step.manifest.clips(step.seen_classes, "val")
    if not len(validation):
        method.choose(candidates, [])
        return None
    hits = torch.zeros(len(candidates), dtype=torch.long, device=step.device)
    count = torch.zeros(1, dtype=torch.long, device=step.device)
    for batch, output in inference.run(network, validation):
        predicted: Tensor = method.candidate_scores(output.select(batch.valid), candidates).argmax(dim=2)
        hits += (predicted == batch.labels[batch.valid]).sum(dim=1)
        count += batch.valid.sum()
    dist.all_reduce(hits)
    dist.all_reduce(count)
    accuracies: list[float] = (hits / count).tolist()
    method.choose(candidates, accuracies)
    return max(accuracies)


def _of_all_ranks(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks, in the order of the plan."""
    return gather_rows(rows, len(rows))


def _new_labels(step: Step) -> list[tuple[int, str]]:
    """Labels and names of the new classes."""
    return list(enumerate(step.new_classes, start=step.context.num_old))
