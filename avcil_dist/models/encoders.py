"""Encoders: what turns a clip's pictures into tokens and its sound into one vector.

A visual encoder gives (B, T, S, D): T frames (or tubelets), S positions, dimension D; an audio
encoder gives (B, D). No encoder mixes the clips of a batch. How weights come from a file or the
hub is below; how clips become pictures and log-mel is not (that is the data layer).
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import huggingface_hub
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.config import (
    AudioMAEConfig,
    ClipConfig,
    PrecomputedConfig,
    SmallConfig,
    TransformerConfig,
    VideoMAEConfig,
)
from avcil_dist.errors import ConfigError

PATCH = 16  # side of a patch, in pixels or in filterbank cells, of both transformers
TUBELET = 2  # frames of a VideoMAE token
SMALL_GRID = 4  # the small visual encoder gives 4 by 4 positions
# What only pre-training or a classifier needs; dropped from a checkpoint, everything else must fit.
VIDEOMAE_DROPPED = ("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.")
AUDIOMAE_DROPPED = ("decoder", "mask_token", "head.")


class Encoder(nn.Module):
    """A module that knows the dimension of what it gives."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim


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
    """A vision transformer that is trained, or frozen: no gradient, always in evaluation mode."""

    def __init__(self, dim: int, body: nn.Module, frozen: bool) -> None:
        super().__init__(dim)
        self.body = body.requires_grad_(not frozen)
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> "Transformer":
        """Switch the mode, which a frozen encoder does not."""
        return super().train(mode and not self.frozen)

    def forward(self, inputs: Tensor) -> Tensor:
        """What `encode` gives, without a graph where frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encode(inputs)

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """The encoder proper."""


class VideoMAE(Transformer):
    """VideoMAE's last hidden state (Tong et al. 2022)."""

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, frames, 3, H, W) -> (B, frames/2, H/16 · W/16, D)."""
        tokens = self.body(inputs).last_hidden_state
        return tokens.unflatten(1, (inputs.shape[1] // TUBELET, -1))


class AudioMAE(Transformer):
    """AudioMAE's mean over patch tokens, the class token left out (Huang et al. 2022)."""

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, mel_frames, mel_bins) -> (B, D)."""
        return self.body(inputs.unsqueeze(1))


def build_visual_encoder(
    config: PrecomputedConfig | SmallConfig | VideoMAEConfig, clip: ClipConfig, feature_dim: int | None
) -> Encoder:
    """Build the visual encoder; `feature_dim` is that of the manifest's features, None for clips.

    Raises ConfigError when the encoder fits neither the data nor its weights.
    """
    _check_data(config.kind, "model.visual", feature_dim)
    if isinstance(config, VideoMAEConfig):
        return _build_videomae(config, clip)
    return SmallVisual(config.dim) if isinstance(config, SmallConfig) else Precomputed(feature_dim or 0)


def build_audio_encoder(
    config: PrecomputedConfig | SmallConfig | AudioMAEConfig, clip: ClipConfig, feature_dim: int | None
) -> Encoder:
    """Build the audio encoder; `feature_dim` is that of the manifest's features, None for clips.

    Raises ConfigError when the encoder fits neither the data nor its weights.
    """
    _check_data(config.kind, "model.audio", feature_dim)
    if isinstance(config, AudioMAEConfig):
        return _build_audiomae(config, clip)
    return SmallAudio(config.dim) if isinstance(config, SmallConfig) else Precomputed(feature_dim or 0)


def _build_videomae(config: VideoMAEConfig, clip: ClipConfig) -> VideoMAE:
    _check_multiple("data.clip.size", clip.size, PATCH)
    _check_multiple("data.clip.frames", clip.frames, TUBELET)
    _check_multiple("model.visual.dim", config.dim, config.heads)
    state = _read_weights(config, "model.visual.weights")
    if state is not None:
        # Older checkpoints have a prefix, and name these biases apart from their layers.
        state = {key.removeprefix("videomae."): tensor for key, tensor in state.items()}
        state = {re.sub(r"\.([qv])_bias$", _bias_name, key): tensor for key, tensor in state.items()}
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
            use_mean_pooling=state is not None and "layernorm.weight" not in state,
        )
    )
    if state is not None:
        _load(body, state, VIDEOMAE_DROPPED, f"model.visual.weights: {config.weights}")
    return VideoMAE(config.dim, body, config.frozen)


def _build_audiomae(config: AudioMAEConfig, clip: ClipConfig) -> AudioMAE:
    _check_multiple("data.clip.mel_frames", clip.mel_frames, PATCH)
    _check_multiple("data.clip.mel_bins", clip.mel_bins, PATCH)
    _check_multiple("model.audio.dim", config.dim, config.heads)
    state = _read_weights(config, "model.audio.weights")
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
        fc_norm=state is not None and "fc_norm.weight" in state,
    )
    if state is not None:
        _load(body, state, AUDIOMAE_DROPPED, f"model.audio.weights: {config.weights}")
    return AudioMAE(config.dim, body, config.frozen)


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


def _bias_name(match: re.Match[str]) -> str:
    return {"q": ".query.bias", "v": ".value.bias"}[match[1]]


def _read_weights(config: TransformerConfig, setting: str) -> dict[str, Tensor] | None:
    """The tensors that `weights` names, a file, a folder or a hub name; None for `random`."""
    if config.weights == "random":
        return None
    path = Path(config.weights)
    if not path.exists():
        path = _download(config.weights, setting)
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not files:
            raise ConfigError(f"{setting}: {path} has neither model.safetensors nor pytorch_model.bin; name the file")
        _check_heads(path / "config.json", config.heads, setting)
        path = files[0]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, safetensors.SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise ConfigError(
            f"{setting}: {path} does not read as a file of tensors ({type(error).__name__}); "
            "save its state dict alone, best as .safetensors"
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConfigError(f"{setting}: {path} is not a state dict; save the names and tensors alone")
    return dict(state)


def _check_heads(path: Path, heads: int, setting: str) -> None:
    """The number of heads shapes no tensor: a wrong one would load, and give wrong features."""
    theirs = json.loads(path.read_text()).get("num_attention_heads", heads) if path.exists() else heads
    if theirs != heads:
        raise ConfigError(
            f"{setting}: {path.parent} has {theirs} attention heads, the config {heads}; set heads: {theirs}"
        )


def _download(name: str, setting: str) -> Path:
    """The hub's files for `owner/name`, as a local folder."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", name) or name.endswith((".safetensors", ".pth", ".bin")):
        raise ConfigError(f"{setting}: no such file: {name}; give a path, a hub name owner/name, or random")
    files = ["config.json", "model.safetensors", "pytorch_model.bin"]
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=files)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}: {name} is neither a path nor reachable on the hub ({type(error).__name__}); "
            "give the path of a file or folder of weights"
        ) from error
    return Path(folder)


def _load(body: nn.Module, state: Mapping[str, Tensor], dropped: tuple[str, ...], where: str) -> None:
    """Load strictly: what is missing, left over or of another shape is an error that names some."""
    expected = body.state_dict()
    given = {key: tensor for key, tensor in state.items() if not key.startswith(dropped)}
    faults = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [key for key in given if key in expected and given[key].shape != expected[key].shape],
    }
    found = [f"{len(keys)} {fault} ({', '.join(keys[:3])})" for fault, keys in faults.items() if keys]
    if found:
        raise ConfigError(
            f"{where}: the weights do not fit the encoder: {'; '.join(found)}; check dim, depth, heads and data.clip "
            f"(keys that begin with {', '.join(dropped)} are dropped)"
        )
    body.load_state_dict(given)
