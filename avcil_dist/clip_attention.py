"""Attention of a stream's networks on given clips, step by step, with the predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avcil_dist import storage
from avcil_dist.config.schema import ClipConfig
from avcil_dist.data.decode import decode_clip
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from avcil_dist.inference import restore_step
from avcil_dist.models.attention.maps import AttentionMap, attention_maps
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.streams.artifact import load_artifact, step_url


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


@dataclass(frozen=True)
class StepAttention:
    """Attention on one clip after a step, and the predicted class."""

    step: int
    map: AttentionMap
    predicted: str


def prepare_clips(urls: Sequence[str], settings: ClipConfig) -> list[PreparedClip]:
    """Decode video files. Raises DataError, naming the file, for one that cannot be read or decoded."""
    transform, prepared = ClipTransform(settings), []
    for url in urls:
        clip = decode_clip(
            storage.read_bytes(url),
            num_frames=settings.frames,
            sample_rate=settings.sample_rate,
            silent=settings.silent,
            where=url,
            reduce=transform.reduced,
        )
        visual, audio = transform(clip)
        frames = clip.frames.permute(0, 2, 3, 1).numpy()
        prepared.append(PreparedClip(url, visual, audio, frames, clip.waveform.numpy(), settings.sample_rate))
    return prepared


@torch.inference_mode()
def step_attention(stream: str, step: int, clips: Sequence[PreparedClip]) -> list[StepAttention]:
    """Return the attention on each clip by the network of a committed step.

    Raises ArtifactError as `load_artifact` does, ConfigError for a network without audio-guided attention or one
    that was trained on features.
    """
    artifact = load_artifact(stream, step)
    config, folder = artifact.config, step_url(stream, step)
    if config.model.visual.kind == "precomputed":
        raise ConfigError(f"{folder}: trained on features; attention on clips needs a stream that was trained on clips")
    network, method = restore_step(artifact, {}, folder)
    if not isinstance(network, AudioVisualNetwork):
        raise ConfigError(f"{folder}: method {config.method.name} has no audio-guided attention; choose another stream")
    network.eval()
    seen, found = artifact.scenario.seen(step), []
    for clip in clips:  # one at a time: no batch of large clips in memory
        encoded = network.attention_view(clip.visual[None], clip.audio[None], slice(None))
        [attention] = attention_maps(encoded.attention, encoded.audio.float(), encoded.visual.float())
        scores = method.scores(network(clip.visual[None], clip.audio[None]))[0]
        found.append(StepAttention(step, attention, seen[int(scores.argmax())]))
    return found
