"""Distributed evaluation: each clip exactly once, whatever the number of ranks and batches."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.config import DataConfig
from avcil_dist.data.loader import FixedSource, load_on_device
from avcil_dist.data.manifest import Manifest, Split
from avcil_dist.data.plan import plan_evaluation, rank_share
from avcil_dist.data.store import Store
from avcil_dist.methods.base import Method
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.training.distributed import gather_rows
from avcil_dist.training.features import check_damaged
from avcil_dist.world import World

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
    """Predicts clips of the seen classes with all ranks together."""

    manifest: Manifest
    scenario: Scenario
    data: DataConfig
    global_batch: int
    world: World
    device: torch.device
    store: Store | None = None

    def __call__(
        self, network: Network, method: Method, split: Split, step: int, *, on_batch: Callable[[], None]
    ) -> Predictions:
        """Predict every clip of `split` of the classes seen at `step`. The network comes back in its mode.

        Raises DataError on all ranks when more clips are damaged than `data.max_bad_fraction` allows.
        """
        clips = self.manifest.clips(self.scenario.seen(step), split)
        batches = rank_share(plan_evaluation(clips, self.global_batch), self.world.rank, self.world.size)
        source = FixedSource(batches)
        predicted: list[Tensor] = []
        faults: list[str] = []
        was_training = network.training
        network.eval()
        with torch.no_grad():  # not inference_mode: what ZeRO 3 gathers under it could not be trained on afterwards
            for batch in load_on_device(
                source,
                manifest=self.manifest,
                labels=self.scenario.labels,
                data=self.data,
                device=self.device,
                store=self.store,
            ):
                output = network(batch.visual, batch.audio)
                predicted.append(_predict(method, output, batch.valid))
                faults.extend(batch.faults)
                on_batch()
        network.train(was_training)
        predictions = _in_order(torch.stack(predicted))[: len(clips)]
        check_damaged(int((predictions == DAMAGED).sum()), len(predictions), faults, self.data)
        labels = self.manifest.shard_labels(self.scenario.labels)[self.manifest.shards_of(clips)]
        return Predictions(clips, labels, predictions)


def _predict(method: Method, output: Output, valid: Tensor) -> Tensor:
    return method.scores(output).argmax(dim=1).masked_fill(~valid, DAMAGED)


def _in_order(predicted: Tensor) -> np.ndarray:
    """From each rank's (batches, rows) to all clips in plan order."""
    num_batches = len(predicted)
    by_rank = gather_rows(predicted.flatten(), predicted.numel()).view(dist.get_world_size(), num_batches, -1)
    return by_rank.transpose(0, 1).flatten().cpu().numpy()
