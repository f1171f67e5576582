"""Encoders made from the configuration, with the preparation of their inputs: built in, or of a plug-in.

A transformer's library takes seconds to import, so it is imported only for a configuration that names it.
"""

import importlib
from collections.abc import Collection
from typing import Any, Literal, TypeVar

from avcil_dist.config.encoders import BUILT_IN_KINDS, AudioConfig, ModelConfig, PlugInEncoderConfig, VisualConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.data.inputs import ClipInputs, Pictures, Sound
from avcil_dist.errors import ConfigError
from avcil_dist.models.encoders.base import AudioEncoder, Encoder, Precomputed, VisualEncoder
from avcil_dist.system.plugins import check_name, load_plug_in

E = TypeVar("E", bound=Encoder)
BUILT_IN = {
    ("visual", "small"): "small:SmallVisual",
    ("visual", "videomae"): "videomae:VideoMAE",
    ("audio", "small"): "small:SmallAudio",
    ("audio", "audiomae"): "audiomae:AudioMAE",
}


def visual_class(kind: str) -> type[VisualEncoder]:
    """Return the class of a kind of visual encoder of clips. Raises ConfigError as `load_plug_in` does."""
    return _encoder_class("visual", kind, VisualEncoder)


def audio_class(kind: str) -> type[AudioEncoder]:
    """Return the class of a kind of audio encoder of clips. Raises ConfigError as `load_plug_in` does."""
    return _encoder_class("audio", kind, AudioEncoder)


def clip_inputs(model: ModelConfig, clip: ClipConfig) -> ClipInputs:
    """Return the preparation of clips for the encoders of a model; that of the settings for features."""
    pictures, sound = Pictures.of(clip), Sound.of(clip)
    if model.visual.kind != "precomputed":
        pictures = visual_class(model.visual.kind).preparation(_options(visual_class, model.visual), clip)
    if model.audio.kind != "precomputed":
        sound = audio_class(model.audio.kind).preparation(_options(audio_class, model.audio), clip)
    return ClipInputs(pictures, sound, clip.silent)


def build_visual_encoder(
    config: VisualConfig, clip: ClipConfig, feature_dim: int | None, state_keys: Collection[str] | None = None
) -> Encoder:
    """Build the visual encoder; `feature_dim` is that of the manifest's features, None for clips.

    `state_keys` is as in `Encoder.build`. Raises ConfigError when the encoder does not fit the data or its weights.
    """
    _check_kind(config.kind, "model.visual", feature_dim)
    if feature_dim is not None:
        return Precomputed(feature_dim)
    kind, options = visual_class(config.kind), _options(visual_class, config)
    pictures = kind.preparation(options, clip)
    encoder = kind.build(options, pictures, state_keys)
    encoder.pictures = pictures
    return encoder


def build_audio_encoder(
    config: AudioConfig, clip: ClipConfig, feature_dim: int | None, state_keys: Collection[str] | None = None
) -> Encoder:
    """Build the audio encoder; arguments and errors are as in `build_visual_encoder`."""
    _check_kind(config.kind, "model.audio", feature_dim)
    if feature_dim is not None:
        return Precomputed(feature_dim)
    kind, options = audio_class(config.kind), _options(audio_class, config)
    sound = kind.preparation(options, clip)
    encoder = kind.build(options, sound, state_keys)
    encoder.sound = sound
    return encoder


def _encoder_class(modality: Literal["visual", "audio"], kind: str, base: type[E]) -> type[E]:
    setting, built_in = f"model.{modality}.kind", BUILT_IN_KINDS[modality]
    check_name(setting, kind, "encoders", {name for names in BUILT_IN_KINDS.values() for name in names})
    if (modality, kind) in BUILT_IN:
        module, _, name = BUILT_IN[modality, kind].partition(":")
        found: type[E] = getattr(importlib.import_module(f"avcil_dist.models.encoders.{module}"), name)
        return found
    found = load_plug_in(setting, kind, "encoders", built_in)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{setting}: the plug-in {kind!r} is no class derived from {base.__module__}.{base.__name__}")
    return found


def _options(class_of: Any, config: VisualConfig | AudioConfig) -> Any:
    """Return the options of an encoder: its section, or the model that a plug-in makes of its section."""
    if not isinstance(config, PlugInEncoderConfig):
        return config
    return class_of(config.kind).Options.model_validate(config.model_extra)


def _check_kind(kind: str, section: str, feature_dim: int | None) -> None:
    """Raise ConfigError for an encoder of features where shards hold clips, and the other way round."""
    if kind == "precomputed" and feature_dim is None:
        raise ConfigError(f"{section}.kind: precomputed needs feature shards, the manifest's shards hold clips")
    if kind != "precomputed" and feature_dim is not None:
        raise ConfigError(f"{section}.kind: {kind} needs clips, the manifest's shards hold features; use precomputed")
