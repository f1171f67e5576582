"""Maps of clips by a network, and the share of them on the regions that make the sound, where these are known."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.clip_table import Region
from avcil_dist.methods.base import Method
from avcil_dist.models.attention.maps import attention_map, evidence_map, token_weights
from avcil_dist.models.attention.token_map import TokenMap
from avcil_dist.models.network import AudioVisualNetwork, Network
from avcil_dist.streams.region_shares import RegionShares
from avcil_dist.training.collectives import gather_rows
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass

MAX_CLIPS = 1024  # per step, evenly spread: more would cost time and change the mean little


@dataclass(frozen=True)
class ClipMaps:
    """Attention, evidence for a class, and the label of the predicted class of one clip."""

    attention: TokenMap
    evidence: TokenMap
    predicted: int


@torch.no_grad()
def clip_maps(
    network: AudioVisualNetwork, method: Method, visual: Tensor, audio: Tensor, label: int | None = None
) -> ClipMaps:
    """Return the maps of one clip by a network in evaluation mode.

    `visual` (T, …) and `audio` (…) are inputs of the encoders. The evidence is that for the class `label`, by default
    for the predicted one.
    """
    view, encoded = network.attention_view(visual[None], audio[None])
    sound, tokens = view.audio.float(), view.visual.float()
    # One clip, or with a projection for each frame (model.fusion=concat) as many clips of one frame as there are frames
    weights = token_weights(view.attention, sound, tokens)
    with torch.enable_grad():
        pooled = (weights * tokens).sum(dim=(1, 2)).requires_grad_()
        scores = method.scores(network.classify_pooled(encoded, sound[:1], pooled))[0]
        predicted = int(scores.argmax())
        gradient = torch.zeros_like(pooled)
        if scores.requires_grad:  # some methods score without a graph: no evidence is known of them
            score = scores[predicted if label is None else label]
            [gradient] = torch.autograd.grad(score, pooled, allow_unused=True, materialize_grads=True)
    weights, tokens = weights.flatten(0, 1), tokens.flatten(0, 1)
    return ClipMaps(
        attention_map(weights / len(pooled)), evidence_map(weights, tokens, gradient.unsqueeze(1)), predicted
    )


def region_shares(step: Step, network: Network, inference: InferencePass) -> RegionShares | None:
    """Return the mean shares of attention and evidence on the known sounding regions of each task's test clips.

    All ranks call it. None where no test clip of a seen class has a region, and for networks without attention.
    """
    if not isinstance(network, AudioVisualNetwork) or not (clips := _clips_with_region(step)).size:
        return None
    was_training = network.training
    network.eval()
    rows = []
    for batch in inference.batches(clips):
        own = np.full((len(batch.valid), 3), np.nan)
        for row in np.flatnonzero(batch.valid.cpu().numpy()):
            region = step.manifest.region(int(batch.clips[row]))
            assert region is not None
            label = int(batch.labels[row])
            maps = clip_maps(network, step.method, batch.visual[row], batch.audio[row], label)
            has_evidence = bool(maps.evidence.mass.any())
            share = maps.evidence.share(region) if has_evidence else np.nan
            own[row] = label, maps.attention.share(region), share
        gathered = gather_rows(torch.from_numpy(own).to(step.device), len(own))
        rows.append(gathered.cpu().numpy())
    network.train(was_training)
    found = np.concatenate(rows)
    found = found[np.isfinite(found[:, 0])]  # without padding and damaged clips
    area = float(np.mean([(bottom - top) * (right - left) for top, left, bottom, right in _regions(step, clips)]))
    return RegionShares.of_clips(found, step.scenario.head_slices(step.number), area)


def _regions(step: Step, clips: np.ndarray) -> list[Region]:
    return [region for clip in clips if (region := step.manifest.region(int(clip)))]


def _clips_with_region(step: Step) -> np.ndarray:
    """Numbers of the test clips of seen classes whose region is known, at most MAX_CLIPS."""
    manifest = step.manifest
    shards = manifest.shard_numbers(step.seen_classes, "test")
    if not any(manifest.shards[number].has_regions for number in shards):
        return np.empty(0, dtype=np.int64)
    clips = manifest.clips(step.seen_classes, "test")
    known = clips[[manifest.region(int(clip)) is not None for clip in clips]]
    return known if len(known) <= MAX_CLIPS else known[np.linspace(0, len(known) - 1, MAX_CLIPS).astype(np.int64)]
