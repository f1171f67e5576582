"""The training of a method in closed form: one pass over the step's clips, sums added up over the ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.data.manifest import Manifest
from avcil_dist.methods.base import ClosedFormMethod, StepContext
from avcil_dist.models.network import Network
from avcil_dist.training.collectives import make_together
from avcil_dist.training.inference_pass import InferencePass


def train_closed_form(
    method: ClosedFormMethod, network: Network, features: InferencePass, manifest: Manifest, context: StepContext
) -> float | None:
    """Let the method see every training clip of the step's new classes once, solve, and choose by validation clips.

    Returns the accuracy on the validation clips of all seen classes; None where there are none.
    """
    for batch, output in features.run(network, manifest.clips(context.scenario.new(context.step), "train")):
        method.accumulate(output.select(batch.valid), batch.labels[batch.valid])
    for total in method.statistics():
        dist.all_reduce(total)
    # One rank solves: it needs the whole of the sums, and the others the same last digit.
    candidates = make_together(method.solve, features.device)
    validation = manifest.clips(context.scenario.seen(context.step), "val")
    if not len(validation):
        method.choose(candidates, [])
        return None
    hits = torch.zeros(len(candidates), dtype=torch.long, device=features.device)
    count = torch.zeros(1, dtype=torch.long, device=features.device)
    for batch, output in features.run(network, validation):
        predicted: Tensor = method.candidate_scores(output.select(batch.valid), candidates).argmax(dim=2)
        hits += (predicted == batch.labels[batch.valid]).sum(dim=1)
        count += batch.valid.sum()
    dist.all_reduce(hits)
    dist.all_reduce(count)
    accuracies: list[float] = (hits / count).tolist()
    method.choose(candidates, accuracies)
    return max(accuracies)
