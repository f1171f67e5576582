"""Attention of a stream's networks on given clips, or the evidence for a class, step by step, with the predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from avcil_dist import storage
from avcil_dist.data.decode import DecodedClip
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from avcil_dist.inference.predict import restore_step
from avcil_dist.models.attention.token_map import TokenMap
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.summary import step_url
from avcil_dist.training.clip_maps import clip_maps


@dataclass(frozen=True)
class PreparedClip:
    """Inputs of the network for a clip, with the pictures and the sound that they come from.

    `visual` (T, 3, size, size) and `audio` (mel_frames, mel_bins) are inputs of the encoders; `frames` uint8
    (T, size, size, 3) are the same frames, `waveform` float32 (samples,) is the sound at `sample_rate` Hz. `film` has
    more frames, for a video.
    """

    name: str
    visual: Tensor
    audio: Tensor
    frames: np.ndarray
    waveform: np.ndarray
    sample_rate: int
    film: np.ndarray | None = None


MAX_FILM = 600  # frames of a video of one clip
Heat = Literal["attention", "evidence"]


@dataclass(frozen=True)
class StepAttention:
    """Map of one clip after a step, and the predicted class."""

    step: int
    map: TokenMap
    predicted: str


def prepare_clips(urls: Sequence[str], inputs: ClipInputs, film_rate: int | None = None) -> list[PreparedClip]:
    """Decode video files for encoders, with `film_rate` also as films of so many frames a second.

    Raises DataError, naming the file, for one that cannot be read or decoded.
    """
    return [prepare_clip(url, storage.read_bytes(url), inputs, film_rate) for url in urls]


def prepare_clip(name: str, data: bytes, inputs: ClipInputs, film_rate: int | None = None) -> PreparedClip:
    """Decode the bytes of a video file as `prepare_clips` does. Raises DataError, with `name`."""
    transform, film = ClipTransform(inputs), None
    clip = transform.decode_reduced(data, where=name)
    if film_rate is not None:
        seconds = len(clip.waveform) / inputs.sound.sample_rate
        count = min(max(round(seconds * film_rate), len(clip.frames)), MAX_FILM)
        longer = replace(inputs, pictures=replace(inputs.pictures, frames=count))
        film = _pictures(ClipTransform(longer).decode_reduced(data, where=name))
    visual, audio = transform.inputs(clip)
    return PreparedClip(name, visual, audio, _pictures(clip), clip.waveform.numpy(), inputs.sound.sample_rate, film)


def _pictures(clip: DecodedClip) -> np.ndarray:
    return np.asarray(clip.frames.permute(0, 2, 3, 1).numpy())


def step_attention(
    stream: str,
    step: int,
    clips: Sequence[PreparedClip],
    classes: Sequence[str | None] = (),
    *,
    heat: Heat = "attention",
) -> list[StepAttention]:
    """Return the map of each clip by the network of a committed step.

    `heat` is as in `models/attention/maps.py`; the evidence is that for the clip's class in `classes`, by default for
    the predicted class. Raises ArtifactError as `load_artifact` does, ConfigError for a network without audio-guided
    attention, one that was trained on features, or a class that is not seen at the step.
    """
    artifact = load_artifact(stream, step)
    config, folder, seen = artifact.config, step_url(stream, step), artifact.scenario.seen(step)
    if config.model.visual.kind == "precomputed":
        raise ConfigError(f"{folder}: trained on features; attention on clips needs a stream that was trained on clips")
    if unseen := [name for name in classes if name is not None and name not in seen]:
        raise ConfigError(f"{folder}: class {unseen[0]!r} is not seen at step {step}; choose later --steps")
    network, method = restore_step(artifact, {}, folder)
    if not isinstance(network, AudioVisualNetwork):
        raise ConfigError(f"{folder}: method {config.method.name} has no audio-guided attention; choose another stream")
    network.eval()
    labels = [None if name is None else seen.index(name) for name in classes or [None] * len(clips)]
    found = [
        clip_maps(network, method, clip.visual, clip.audio, label) for clip, label in zip(clips, labels, strict=True)
    ]
    return [
        StepAttention(step, maps.attention if heat == "attention" else maps.evidence, seen[maps.predicted])
        for maps in found
    ]
