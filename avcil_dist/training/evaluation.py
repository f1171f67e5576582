"""Distributed evaluation: each clip is predicted exactly once, whatever the number of ranks and batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.data.shard import Split
from avcil_dist.methods.base import Method
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.training.collectives import gather_rows
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.observer import Observer

DAMAGED = -1
UNOBSERVED = Observer()


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


@dataclass(frozen=True)
class ScoredPredictions(Predictions):
    """Predictions with the class scores (clips, seen classes), float32; NaN in the rows of damaged clips."""

    scores: np.ndarray


def evaluate(step: Step, network: Network, split: Split, inference: InferencePass) -> Predictions:
    """Predict every clip of `split` of the seen classes, by all ranks together. The network keeps its mode.

    Raises DataError on all ranks when more clips are damaged than `data.max_bad_fraction` allows.
    """
    clips = step.manifest.clips(step.seen_classes, split)
    predicted: list[Tensor] = []
    for batch, output in inference.run(network, clips, step.config.optim.global_eval_batch):
        predicted.append(_predict(_scores(step.method, output), batch.valid))
    return Predictions(clips, _labels(step, clips), _in_order(predicted)[: len(clips)])


def evaluate_scores(
    step: Step, network: Network, split: Split, inference: InferencePass, observer: Observer = UNOBSERVED
) -> ScoredPredictions:
    """`evaluate`, with the class scores of every clip, on all ranks, as the test of `observer`."""
    clips = step.manifest.clips(step.seen_classes, split)
    observer.begin_test(inference.num_batches(clips, step.config.optim.global_eval_batch))
    predicted: list[Tensor] = []
    scored: list[Tensor] = []
    for batch, output in inference.run(network, clips, step.config.optim.global_eval_batch):
        scores = _scores(step.method, output)
        predicted.append(_predict(scores, batch.valid))
        scored.append(scores.float().masked_fill(~batch.valid[:, None], torch.nan))
        observer.advance()
    rows = slice(len(clips))
    return ScoredPredictions(clips, _labels(step, clips), _in_order(predicted)[rows], _in_order(scored)[rows])


def validation_logits(step: Step, network: Network, inference: InferencePass) -> tuple[Tensor, Tensor]:
    """Return logits (N, C) and labels (N,) of the readable validation clips of all seen classes, on all ranks."""
    logits, labels = [], []
    for batch, output in inference.run(network, step.manifest.clips(step.seen_classes, "val")):
        valid = gather_rows(batch.valid, len(batch.valid))
        logits.append(gather_rows(output.logits, len(output.logits))[valid].cpu())
        labels.append(gather_rows(batch.labels, len(batch.labels))[valid].cpu())
    return torch.cat(logits), torch.cat(labels)


@torch.no_grad()
def _scores(method: Method, output: Output) -> Tensor:
    return method.scores(output)


def _predict(scores: Tensor, valid: Tensor) -> Tensor:
    return scores.argmax(dim=1).masked_fill(~valid, DAMAGED)


def _labels(step: Step, clips: np.ndarray) -> np.ndarray:
    return step.manifest.shard_labels(step.scenario.labels)[step.manifest.shards_of(clips)]


def _in_order(batches: Sequence[Tensor]) -> np.ndarray:
    """Gather each rank's batches of (rows, …) into the rows of all clips, in plan order."""
    own = torch.cat(list(batches))
    by_rank = gather_rows(own, len(own)).unflatten(0, (dist.get_world_size(), len(batches), -1))
    return by_rank.transpose(0, 1).flatten(0, 2).cpu().numpy()
