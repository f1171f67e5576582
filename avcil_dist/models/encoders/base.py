"""Encoder interface, features that are already encoded, and transformers: frozen, with trained blocks or adapters.

An encoder and the preparation of its inputs are one object. A visual encoder returns tokens (B, T, S, D): T frames (or
tubelets), S positions, dimension D. An audio encoder returns one vector per clip (B, D). No encoder mixes the clips of
a batch. `build.py` makes them from the configuration.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from avcil_dist.config.encoders import TransformerConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.config.section import Section
from avcil_dist.data.inputs import Pictures, Sound
from avcil_dist.errors import ConfigError
from avcil_dist.models.encoders.adapters import add_adapters, has_adapters

TUBELET = 2  # frames per token of VideoMAE
PATCH = 16  # side of a patch of the transformers, in pixels or filterbank cells


class Encoder(nn.Module):
    """Module with outputs of dimension `dim`."""

    class Options(Section):
        """Settings of the encoder beside its kind; an encoder with settings overrides this class."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @classmethod
    def build(cls, options: Any, inputs: Any, state_keys: Collection[str] | None = None) -> Self:
        """Make the encoder for inputs of this preparation, with the weights that its options name.

        With `state_keys`, the keys of a state that the caller loads, no weights are read, and they need not exist.
        By default the constructor is called with the options.
        """
        return cls(options)

    def checkpoint_activations(self) -> None:
        """Recompute the activations of each block in the backward pass; for transformers, a no-op for others."""

    def encode_if_frozen(self, inputs: Tensor) -> Tensor:
        """Encode once for student and teacher: the output if the encoder is frozen, otherwise `inputs` unchanged.

        `forward` passes an output of a frozen encoder through.
        """
        return inputs

    def fixed_copy(self) -> "Encoder | None":
        """Return a frozen copy of an encoder that is trained; None for one that is not."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return None
        return copy.deepcopy(self).requires_grad_(False)


class VisualEncoder(Encoder):
    """Encoder of frames: (B, frames, 3, H, W) -> (B, T, S, D)."""

    pictures: Pictures  # the preparation of its inputs

    @classmethod
    def preparation(cls, options: Any, clip: ClipConfig) -> Pictures:
        """Return the preparation of the inputs, before an encoder is made: by default that of `data.clip`."""
        return Pictures.of(clip)

    @property
    def num_frames(self) -> int:
        """Number T of frames of its tokens."""
        return self.pictures.frames


class AudioEncoder(Encoder):
    """Encoder of sound: (B, mel_frames, mel_bins), or what its preparation makes of it, -> (B, D)."""

    sound: Sound  # the preparation of its inputs

    @classmethod
    def preparation(cls, options: Any, clip: ClipConfig) -> Sound:
        """Return the preparation of the inputs, before an encoder is made: by default that of `data.clip`."""
        return Sound.of(clip)


class Precomputed(Encoder):
    """Features from feature shards, passed through.

    Vectors become float32. Tokens keep their type, because a converted copy would be large; the attention converts
    them tile by tile.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Visual (B, T, S, D) or audio (B, D)."""
        return features.float() if features.dim() == 2 else features


class Transformer(Encoder, ABC):
    """Vision transformer, trained in full, in its last blocks, by adapters, or not at all.

    Frozen parts take no gradient, stay in evaluation mode, and have no autograd graph: they are the lower part, so
    none of their inputs needs a gradient. A frozen transformer passes its own outputs through. With train=adapters a
    new transformer has adapters in all blocks, and one for a state of merged adapters is frozen.
    """

    input_dims: int  # number of dimensions of an input; an output has one less
    body: Any  # a library's module; its blocks and norms have the library's names

    def __init__(
        self, dim: int, body: nn.Module, config: TransformerConfig, state_keys: Collection[str] | None = None
    ) -> None:
        """Take a library's module; `state_keys` is as in `Encoder.build`."""
        super().__init__(dim)
        self.body = body.requires_grad_(False)
        is_adapted = config.train == "adapters" and (state_keys is None or has_adapters(state_keys))
        self.frozen = config.train == "frozen" or (config.train == "adapters" and not is_adapted)
        # Numbers, not modules: a module assigned here would be registered, and saved, a second time.
        self._first_trained = 0 if is_adapted else len(self.blocks) - (config.last_blocks or 0)
        self._is_whole = config.train == "full"
        if is_adapted:
            assert config.adapter_rank is not None
            add_adapters(self.blocks, config.adapter_rank)  # which take a gradient
        else:
            for module in self.trained_modules():
                module.requires_grad_(True)
        self.train()

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks, from the lowest to the highest."""

    @property
    @abstractmethod
    def norms(self) -> Sequence[nn.Module]:
        """Final norms, above the blocks."""

    def trained_modules(self) -> list[nn.Module]:
        """Modules whose parameters, or adapters, are trained."""
        if self._is_whole:
            return [self.body]
        return [] if self.frozen else [*self.blocks[self._first_trained :], *self.norms]

    def depths(self) -> dict[nn.Parameter, int]:
        """Distance of each parameter from the top: 0 for final norms, 1 for the highest block, most for embeddings."""
        depths = dict.fromkeys(self.body.parameters(), len(self.blocks) + 1)
        for number, block in enumerate(self.blocks):
            depths |= dict.fromkeys(block.parameters(), len(self.blocks) - number)
        for norm in self.norms:
            depths |= dict.fromkeys(norm.parameters(), 0)
        return depths

    def train(self, mode: bool = True) -> "Transformer":
        """Set the mode of the trained modules; frozen ones stay in evaluation mode."""
        super().train(False)
        self.training = mode and not self.frozen
        for module in self.trained_modules():
            module.train(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Encode the inputs, without a graph if frozen."""
        if self.frozen and inputs.dim() < self.input_dims:
            return inputs
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encode(inputs)

    def encode_if_frozen(self, inputs: Tensor) -> Tensor:
        """Encode if frozen, as for every `Encoder`."""
        return self(inputs) if self.frozen else inputs

    def fixed_copy(self) -> "Encoder | None":
        """Return a frozen copy, as for every `Encoder`."""
        fixed = super().fixed_copy()
        if isinstance(fixed, Transformer):
            fixed.frozen, fixed._is_whole = True, False
            fixed.train()
        return fixed

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Run the library's module, and bring its output into the shape of an encoder's."""


def check_multiple(setting: str, value: int, factor: int) -> None:
    """Raise ConfigError unless `value` of `setting` is a multiple of `factor`."""
    if value % factor:
        raise ConfigError(f"{setting}={value} is not a multiple of {factor}, which the transformer needs")
