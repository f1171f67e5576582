"""Distributed evaluation: each clip is predicted exactly once, whatever the number of ranks and batches."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.data.manifest import Split
from avcil_dist.methods.base import Method
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.training.collectives import gather_rows
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass

DAMAGED = -1


@dataclass(frozen=True)
class Predictions:
    """Clip numbers, labels, predicted labels (clips,) in the manifest's order; DAMAGED for a damaged clip."""

    clips: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray

    @property
    def accuracy(self) -> float:
        """The fraction predicted correctly."""
        return float((self.labels == self.predictions).mean())


def evaluate(
    step: Step, network: Network, split: Split, inference: InferencePass, *, on_batch: Callable[[], None] = lambda: None
) -> Predictions:
    """Predict every clip of `split` of the seen classes, by all ranks together. The network keeps its mode.

    `on_batch` is called after each batch. Raises DataError on all ranks when more clips are damaged than
    `data.max_bad_fraction` allows.
    """
    clips = step.manifest.clips(step.seen_classes, split)
    predicted: list[Tensor] = []
    for batch, output in inference.run(network, clips, step.config.optim.global_eval_batch):
        predicted.append(_predict(step.method, output, batch.valid))
        on_batch()
    predictions = _in_order(torch.stack(predicted))[: len(clips)]
    labels = step.manifest.shard_labels(step.scenario.labels)[step.manifest.shards_of(clips)]
    return Predictions(clips, labels, predictions)


@torch.no_grad()
def _predict(method: Method, output: Output, valid: Tensor) -> Tensor:
    return method.scores(output).argmax(dim=1).masked_fill(~valid, DAMAGED)


def _in_order(predicted: Tensor) -> np.ndarray:
    """Gather each rank's predictions (batches, rows) into those of all clips, in plan order."""
    num_batches = len(predicted)
    by_rank = gather_rows(predicted.flatten(), predicted.numel()).view(dist.get_world_size(), num_batches, -1)
    return by_rank.transpose(0, 1).flatten().cpu().numpy()
