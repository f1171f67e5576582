"""Encoders made from the configuration.

A transformer's library takes seconds to import, so it is imported only for a configuration that names it.
"""

from collections.abc import Collection

from avcil_dist.config.encoders import AudioMAEConfig, PrecomputedConfig, SmallConfig, VideoMAEConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from avcil_dist.models.encoders.base import Encoder, Precomputed
from avcil_dist.models.encoders.small import SmallAudio, SmallVisual


def build_visual_encoder(
    config: PrecomputedConfig | SmallConfig | VideoMAEConfig,
    clip: ClipConfig,
    feature_dim: int | None,
    state_keys: Collection[str] | None = None,
) -> Encoder:
    """Build the visual encoder; `feature_dim` is that of the manifest's features, None for clips.

    With `state_keys`, the keys of a state that the caller loads, no weights are read, and they need not exist.
    Raises ConfigError when the encoder does not fit the data or its weights.
    """
    _check_kind(config.kind, "model.visual", feature_dim)
    if isinstance(config, VideoMAEConfig):
        from avcil_dist.models.encoders.videomae import build_videomae

        return build_videomae(config, clip, state_keys)
    return SmallVisual(config.dim) if isinstance(config, SmallConfig) else Precomputed(feature_dim or 0)


def build_audio_encoder(
    config: PrecomputedConfig | SmallConfig | AudioMAEConfig,
    clip: ClipConfig,
    feature_dim: int | None,
    state_keys: Collection[str] | None = None,
) -> Encoder:
    """Build the audio encoder; `feature_dim` and `state_keys` are as in `build_visual_encoder`.

    Raises ConfigError when the encoder does not fit the data or its weights.
    """
    _check_kind(config.kind, "model.audio", feature_dim)
    if isinstance(config, AudioMAEConfig):
        from avcil_dist.models.encoders.audiomae import build_audiomae

        return build_audiomae(config, clip, state_keys)
    return SmallAudio(config.dim) if isinstance(config, SmallConfig) else Precomputed(feature_dim or 0)


def _check_kind(kind: str, section: str, feature_dim: int | None) -> None:
    """Raise ConfigError for an encoder of features where shards hold clips, and the other way round."""
    if kind == "precomputed" and feature_dim is None:
        raise ConfigError(f"{section}.kind: precomputed needs feature shards, the manifest's shards hold clips")
    if kind != "precomputed" and feature_dim is not None:
        raise ConfigError(f"{section}.kind: {kind} needs clips, the manifest's shards hold features; use precomputed")
