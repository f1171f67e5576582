"""Distributed evaluation: each clip exactly once, whatever the number of ranks and batches."""

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
from avcil_dist.training.inference_pass import InferencePass

DAMAGED = -1


@dataclass(frozen=True)
class Predictions:
    """Clip numbers, labels, predicted labels (clips,) in the manifest's order; a damaged clip is predicted DAMAGED."""

    clips: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray

    @property
    def accuracy(self) -> float:
        """The fraction predicted correctly."""
        return float((self.labels == self.predictions).mean())


@dataclass(frozen=True)
class Evaluator:
    """Predicts clips of the seen classes with all ranks together, `global_batch` at a time."""

    features: InferencePass
    global_batch: int

    def __call__(
        self, network: Network, method: Method, split: Split, step: int, *, on_batch: Callable[[], None]
    ) -> Predictions:
        """Predict every clip of `split` of the classes seen at `step`. The network comes back in its mode.

        Raises DataError on all ranks when more clips are damaged than `data.max_bad_fraction` allows.
        """
        manifest, scenario = self.features.manifest, self.features.scenario
        clips = manifest.clips(scenario.seen(step), split)
        predicted: list[Tensor] = []
        for batch, output in self.features.run(network, clips, self.global_batch):
            predicted.append(_predict(method, output, batch.valid))
            on_batch()
        predictions = _in_order(torch.stack(predicted))[: len(clips)]
        labels = manifest.shard_labels(scenario.labels)[manifest.shards_of(clips)]
        return Predictions(clips, labels, predictions)


@torch.no_grad()
def _predict(method: Method, output: Output, valid: Tensor) -> Tensor:
    return method.scores(output).argmax(dim=1).masked_fill(~valid, DAMAGED)


def _in_order(predicted: Tensor) -> np.ndarray:
    """From each rank's (batches, rows) to all clips in plan order."""
    num_batches = len(predicted)
    by_rank = gather_rows(predicted.flatten(), predicted.numel()).view(dist.get_world_size(), num_batches, -1)
    return by_rank.transpose(0, 1).flatten().cpu().numpy()
