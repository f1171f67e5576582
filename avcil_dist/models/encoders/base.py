"""Encoders: what turns a clip's pictures into tokens and its sound into one vector.

A visual encoder gives (B, T, S, D): T frames (or tubelets), S positions, dimension D; an audio
encoder gives (B, D). No encoder mixes the clips of a batch. How weights come from a file or the
hub is `weights.py`; how clips become pictures and log-mel is the data layer's.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.config.schema import (
    AudioMAEConfig,
    ClipConfig,
    PrecomputedConfig,
    SmallConfig,
    TransformerConfig,
    VideoMAEConfig,
)
from avcil_dist.errors import ConfigError
from avcil_dist.models.encoders.weights import (
    AUDIOMAE_DROPPED,
    VIDEOMAE_DROPPED,
    load_strictly,
    read_weights,
    rename_videomae,
)

PATCH = 16  # side of a patch, in pixels or in filterbank cells, of both transformers
TUBELET = 2  # frames of a VideoMAE token
SMALL_GRID = 4  # the small visual encoder gives 4 by 4 positions


class Encoder(nn.Module):
    """A module that knows the dimension of what it gives."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def checkpoint_activations(self) -> None:
        """Compute the activations of each block anew in the backward pass, instead of keeping them: transformers do."""

    def encode_if_frozen(self, inputs: Tensor) -> Tensor:
        """What may take the inputs' place for every network that shares this encoder: what a frozen one makes of them.

        One that is not frozen gives the inputs back, since each network makes something else of them.
        """
        return inputs


class Precomputed(Encoder):
    """Features as they are: vectors in float32, tokens in the type they come in, which whoever sums them converts."""

    def forward(self, features: Tensor) -> Tensor:
        """Visual (B, T, S, D) or audio (B, D)."""
        return features.float() if features.dim() == 2 else features


class SmallVisual(Encoder):
    """Strided convolutions over each frame, and one over time in the middle, so that motion counts."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.early = nn.Sequential(*_convolution(3, 16), *_convolution(16, 32))
        self.over_time = nn.Conv3d(32, 32, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        self.late = nn.Sequential(*_convolution(32, dim))

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> (B, T, 16, D)."""
        clips, frames = pictures.shape[:2]
        maps = self.early(pictures.flatten(0, 1)).unflatten(0, (clips, frames))
        mixed = maps + self.over_time(maps.transpose(1, 2)).transpose(1, 2)
        tokens = F.adaptive_avg_pool2d(self.late(mixed.flatten(0, 1)), SMALL_GRID)
        return tokens.flatten(2).transpose(1, 2).unflatten(0, (clips, frames))


class SmallAudio(Encoder):
    """Strided convolutions on the log-mel filterbank.

    A second channel says where on the mel scale a value lies: convolutions and a mean know no place, but pitch is one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.layers = nn.Sequential(*_convolution(2, 16), *_convolution(16, 32), *_convolution(32, dim))

    def forward(self, log_mel: Tensor) -> Tensor:
        """(B, mel_frames, mel_bins) -> (B, D)."""
        pitch = torch.linspace(-1, 1, log_mel.shape[2], device=log_mel.device, dtype=log_mel.dtype)
        return self.layers(torch.stack([log_mel, pitch.expand_as(log_mel)], dim=1)).mean(dim=(2, 3))


class Transformer(Encoder, ABC):
    """A vision transformer of which all, the last blocks or nothing is trained.

    What is not trained takes no gradient and stays in evaluation mode, and no graph is built of it:
    it is what lies below, so nothing that needs a gradient ever enters it. A frozen one lets pass what
    it has encoded before.
    """

    input_dims: int  # what is encoded has one less
    body: Any  # a library's, whose blocks and norms have names of their own

    def __init__(self, dim: int, body: nn.Module, config: TransformerConfig) -> None:
        super().__init__(dim)
        self.body = body.requires_grad_(False)
        self.frozen = config.train == "frozen"
        # Numbers, not modules: a module kept here a second time would be saved a second time.
        self._first_trained = len(self.blocks) - (config.last_blocks or 0)
        self._is_whole = config.train == "full"
        for module in self.trained():
            module.requires_grad_(True)
        self.train()

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks, from the lowest to the highest."""

    @property
    @abstractmethod
    def norms(self) -> Sequence[nn.Module]:
        """What lies above the blocks."""

    def trained(self) -> list[nn.Module]:
        """The modules whose parameters are trained."""
        if self._is_whole:
            return [self.body]
        return [] if self.frozen else [*self.blocks[self._first_trained :], *self.norms]

    def depths(self) -> dict[nn.Parameter, int]:
        """How far each parameter lies below the top: final norms 0, the highest block 1, patches and positions most."""
        depths = dict.fromkeys(self.body.parameters(), len(self.blocks) + 1)
        for number, block in enumerate(self.blocks):
            depths |= dict.fromkeys(block.parameters(), len(self.blocks) - number)
        for norm in self.norms:
            depths |= dict.fromkeys(norm.parameters(), 0)
        return depths

    def train(self, mode: bool = True) -> "Transformer":
        """Switch the mode of what is trained."""
        super().train(False)
        self.training = mode and not self.frozen
        for module in self.trained():
            module.train(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """What `encode` gives, without a graph where frozen."""
        if self.frozen and inputs.dim() < self.input_dims:
            return inputs
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encode(inputs)

    def encode_if_frozen(self, inputs: Tensor) -> Tensor:
        """Where frozen, what student and teacher both see."""
        return self(inputs) if self.frozen else inputs

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """The encoder proper."""


class VideoMAE(Transformer):
    """VideoMAE's last hidden state (Tong et al. 2022)."""

    input_dims = 5

    def checkpoint_activations(self) -> None:
        """By the library's own means."""
        assert isinstance(self.body, transformers.PreTrainedModel)
        self.body.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The library's layers."""
        return self.body.encoder.layer

    @property
    def norms(self) -> Sequence[nn.Module]:
        """The final norm; a fine-tuned checkpoint has none over its tokens."""
        return [] if self.body.layernorm is None else [self.body.layernorm]

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, frames, 3, H, W) -> (B, frames/2, H/16 · W/16, D)."""
        tokens = self.body(inputs).last_hidden_state
        return tokens.unflatten(1, (inputs.shape[1] // TUBELET, -1))


class AudioMAE(Transformer):
    """AudioMAE's mean over patch tokens, the class token left out (Huang et al. 2022)."""

    input_dims = 3

    def checkpoint_activations(self) -> None:
        """By the library's own means."""
        assert isinstance(self.body, VisionTransformer)
        self.body.set_grad_checkpointing(True)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The library's blocks."""
        return self.body.blocks

    @property
    def norms(self) -> Sequence[nn.Module]:
        """The norm before the mean or after it; the other is an identity."""
        return [self.body.norm, self.body.fc_norm]

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, mel_frames, mel_bins) -> (B, D)."""
        return self.body(inputs.unsqueeze(1))


def build_visual_encoder(
    config: PrecomputedConfig | SmallConfig | VideoMAEConfig,
    clip: ClipConfig,
    feature_dim: int | None,
    state_keys: Collection[str] | None = None,
) -> Encoder:
    """Build the visual encoder; `feature_dim` is that of the manifest's features, None for clips.

    `state_keys` names what of its state will be put in; then no weights are read, and they need not be there.
    Raises ConfigError when the encoder fits neither the data nor its weights.
    """
    _check_data(config.kind, "model.visual", feature_dim)
    if isinstance(config, VideoMAEConfig):
        return _build_videomae(config, clip, state_keys)
    return SmallVisual(config.dim) if isinstance(config, SmallConfig) else Precomputed(feature_dim or 0)


def build_audio_encoder(
    config: PrecomputedConfig | SmallConfig | AudioMAEConfig,
    clip: ClipConfig,
    feature_dim: int | None,
    state_keys: Collection[str] | None = None,
) -> Encoder:
    """Build the audio encoder; `feature_dim` and `state_keys` are as in `build_visual_encoder`.

    Raises ConfigError when the encoder fits neither the data nor its weights.
    """
    _check_data(config.kind, "model.audio", feature_dim)
    if isinstance(config, AudioMAEConfig):
        return _build_audiomae(config, clip, state_keys)
    return SmallAudio(config.dim) if isinstance(config, SmallConfig) else Precomputed(feature_dim or 0)


def _build_videomae(config: VideoMAEConfig, clip: ClipConfig, state_keys: Collection[str] | None) -> VideoMAE:
    _check_multiple("data.clip.size", clip.size, PATCH)
    _check_multiple("data.clip.frames", clip.frames, TUBELET)
    _check_multiple("model.visual.dim", config.dim, config.heads)
    state = read_weights(config, "model.visual.weights") if state_keys is None else None
    if state is not None:
        state = rename_videomae(state)
    names = state if state_keys is None else {name.removeprefix("body.") for name in state_keys}
    body = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(
            image_size=clip.size,
            patch_size=PATCH,
            num_frames=clip.frames,
            tubelet_size=TUBELET,
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.dim,
            # The library's word for "no norm at the end": true of classifiers, not of the pre-trained model.
            use_mean_pooling=names is not None and "layernorm.weight" not in names,
        )
    )
    if state is not None:
        load_strictly(body, state, VIDEOMAE_DROPPED, f"model.visual.weights: {config.weights}")
    return VideoMAE(config.dim, body, config)


def _build_audiomae(config: AudioMAEConfig, clip: ClipConfig, state_keys: Collection[str] | None) -> AudioMAE:
    _check_multiple("data.clip.mel_frames", clip.mel_frames, PATCH)
    _check_multiple("data.clip.mel_bins", clip.mel_bins, PATCH)
    _check_multiple("model.audio.dim", config.dim, config.heads)
    state = read_weights(config, "model.audio.weights") if state_keys is None else None
    names = state if state_keys is None else {name.removeprefix("body.") for name in state_keys}
    body = VisionTransformer(
        img_size=(clip.mel_frames, clip.mel_bins),
        patch_size=PATCH,
        in_chans=1,
        num_classes=0,
        global_pool="avg",
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        # Fine-tuned checkpoints normalise after the mean, pre-trained ones before it.
        fc_norm=names is not None and "fc_norm.weight" in names,
    )
    if state is not None:
        load_strictly(body, state, AUDIOMAE_DROPPED, f"model.audio.weights: {config.weights}")
    return AudioMAE(config.dim, body, config)


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    """Halve the map. GroupNorm, not BatchNorm: a clip's result must not depend on its batch."""
    norm = nn.GroupNorm(math.gcd(8, channels_out), channels_out)
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1), norm, nn.ReLU()


def _check_data(kind: str, section: str, feature_dim: int | None) -> None:
    if kind == "precomputed" and feature_dim is None:
        raise ConfigError(f"{section}.kind: precomputed needs feature shards, the manifest's shards hold clips")
    if kind != "precomputed" and feature_dim is not None:
        raise ConfigError(f"{section}.kind: {kind} needs clips, the manifest's shards hold features; use precomputed")


def _check_multiple(setting: str, value: int, factor: int) -> None:
    if value % factor:
        raise ConfigError(f"{setting}={value} is not a multiple of {factor}, which the transformer needs")
