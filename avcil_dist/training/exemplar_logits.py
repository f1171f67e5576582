"""Stored logits of exemplars: computed when a step stores them, and looked up for the batches of later steps."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.errors import ArtifactError
from avcil_dist.models.network import Network
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.streams.exemplar_logits import ExemplarLogits, updated_logits
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import step_url
from avcil_dist.training.collectives import gather_rows
from avcil_dist.training.exemplars import exemplar_clips
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass


@dataclass(frozen=True)
class StoredRows:
    """Logits of exemplars by clip: row i of `values` (E, C) and `counts` (E,) is that of `clips[i]`, ascending.

    The last row is that of all other clips, of which nothing is known.
    """

    clips: np.ndarray
    values: Tensor
    counts: Tensor

    def lookup(self, clips: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the logits (B, C) of these clips on `device`, and the numbers (B,) of their known classes."""
        places = np.searchsorted(self.clips, clips)
        is_stored = self.clips[np.minimum(places, len(self.clips) - 1)] == clips if len(self.clips) else False
        rows = torch.from_numpy(np.where(is_stored, places, len(self.clips)))
        return self.values[rows].to(device), self.counts[rows].to(device)


def stored_rows(step: Step, previous: StepArtifact | None) -> StoredRows | None:
    """Return the logits stored with the exemplars of `previous`, if the method needs them; None at step 0.

    Raises ArtifactError for an artifact without them.
    """
    if previous is None or not step.needs.stored_logits:
        return None
    logits = previous.exemplar_logits
    if logits is None:
        folder = step_url(stream_url(step.config), previous.step)
        raise ArtifactError(f"{folder}: has no logits of its exemplars; begin anew with --restart")
    clips = exemplar_clips(step.manifest, previous.memory)
    order = torch.from_numpy(np.argsort(clips))
    values = torch.cat([logits.values[order], logits.values.new_zeros(1, logits.values.shape[1])])
    return StoredRows(clips[order.numpy()], values, torch.cat([logits.counts[order], logits.counts.new_zeros(1)]))


def store_logits(
    step: Step, previous: StepArtifact | None, memory: ExemplarMemory, network: Network, inference: InferencePass
) -> ExemplarLogits | None:
    """Return the logits of all exemplars of `memory`, that after the step, if the method needs them. On all ranks.

    Those of new exemplars are of `network`, which has the weights that the step commits; the others keep theirs.
    """
    if not step.needs.stored_logits:
        return None
    before = previous.memory if previous else ExemplarMemory({})
    added = ExemplarMemory({name: keys for name, keys in memory.keys.items() if name not in before.keys})
    clips = exemplar_clips(step.manifest, added)
    logits, valid = [torch.zeros(0, step.context.num_seen)], [torch.zeros(0, dtype=torch.bool)]
    for batch, output in inference.run(network, clips):
        logits.append(gather_rows(output.logits, len(output.logits)).float().cpu())
        valid.append(gather_rows(batch.valid, len(batch.valid)).cpu())
    is_valid = torch.cat(valid)[: len(clips)]  # the last batch is padded
    values = torch.where(is_valid[:, None], torch.cat(logits)[: len(clips)], 0.0)
    new = ExemplarLogits(values, step.context.num_seen * is_valid.long())
    return updated_logits(before, previous.exemplar_logits if previous else None, memory, new)
