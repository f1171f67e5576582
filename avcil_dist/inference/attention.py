"""Attention of a stream's networks on given clips, or the evidence for a class, step by step, with the predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from avcil_dist import storage
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from avcil_dist.inference.predict import restore_step
from avcil_dist.methods.base import Method
from avcil_dist.models.attention.maps import TokenMap, attention_map, evidence_map, token_weights
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.summary import step_url


@dataclass(frozen=True)
class PreparedClip:
    """Inputs of the network for a clip, with the pictures and the sound that they come from.

    `visual` (T, 3, size, size) and `audio` (mel_frames, mel_bins) are inputs of the encoders; `frames` uint8
    (T, size, size, 3) are the same frames, `waveform` float32 (samples,) is the sound at `sample_rate` Hz.
    """

    name: str
    visual: Tensor
    audio: Tensor
    frames: np.ndarray
    waveform: np.ndarray
    sample_rate: int


Heat = Literal["attention", "evidence"]


@dataclass(frozen=True)
class StepAttention:
    """Map of one clip after a step, and the predicted class."""

    step: int
    map: TokenMap
    predicted: str


def prepare_clips(urls: Sequence[str], inputs: ClipInputs) -> list[PreparedClip]:
    """Decode video files for encoders. Raises DataError, naming the file, for one that cannot be read or decoded."""
    transform, prepared = ClipTransform(inputs), []
    for url in urls:
        clip = transform.decode_reduced(storage.read_bytes(url), where=url)
        visual, audio = transform.inputs(clip)
        frames = clip.frames.permute(0, 2, 3, 1).numpy()
        prepared.append(PreparedClip(url, visual, audio, frames, clip.waveform.numpy(), inputs.sound.sample_rate))
    return prepared


def step_attention(
    stream: str, step: int, clips: Sequence[PreparedClip], *, heat: Heat = "attention", class_name: str | None = None
) -> list[StepAttention]:
    """Return the map of each clip by the network of a committed step.

    `heat` is as in `models/attention/maps.py`; the evidence is that for `class_name`, by default for the predicted
    class. Raises ArtifactError as `load_artifact` does, ConfigError for a network without audio-guided attention, one
    that was trained on features, or a class that is not seen at the step.
    """
    artifact = load_artifact(stream, step)
    config, folder, seen = artifact.config, step_url(stream, step), artifact.scenario.seen(step)
    if config.model.visual.kind == "precomputed":
        raise ConfigError(f"{folder}: trained on features; attention on clips needs a stream that was trained on clips")
    if class_name is not None and class_name not in seen:
        raise ConfigError(f"{folder}: class {class_name!r} is not seen at step {step}; choose later --steps")
    network, method = restore_step(artifact, {}, folder)
    if not isinstance(network, AudioVisualNetwork):
        raise ConfigError(f"{folder}: method {config.method.name} has no audio-guided attention; choose another stream")
    network.eval()
    return [_attention(network, method, clip, step, seen, heat, class_name) for clip in clips]


@torch.no_grad()
def _attention(
    network: AudioVisualNetwork,
    method: Method,
    clip: PreparedClip,
    step: int,
    seen: Sequence[str],
    heat: Heat,
    class_name: str | None,
) -> StepAttention:
    encoded = network.attention_view(clip.visual[None], clip.audio[None], slice(None))
    audio, visual = encoded.audio.float(), encoded.visual.float()
    weights = token_weights(encoded.attention, audio, visual)
    # (T, S, D), whether the attention pooled the frames together or, for a fusion, each alone
    by_frame, tokens = weights.flatten(0, 1), visual.flatten(0, 1)
    with torch.enable_grad():
        pooled = (weights * visual).sum(dim=(1, 2)).requires_grad_()
        scores = method.scores(network.fuse_and_classify(audio[:1], pooled))[0]
        predicted = seen[int(scores.argmax())]
        if heat == "attention":
            return StepAttention(step, attention_map(by_frame / len(weights)), predicted)
        [gradient] = torch.autograd.grad(scores[seen.index(class_name or predicted)], pooled)
    return StepAttention(step, evidence_map(by_frame, tokens, gradient[:, None]), predicted)
