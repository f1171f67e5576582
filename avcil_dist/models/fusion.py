"""Fusion of a clip's sound with its frames over time, after the attention has pooled the positions of each frame.

The published network has no such module: its attention also pools the frames (`model.fusion: attention`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.errors import ConfigError
from avcil_dist.system.plugins import check_name, load_plug_in

NUM_BLOCKS = 2
MAX_HEADS = 8


class Fusion(nn.Module):
    """Module from sound (B, D) and one token per frame (B, T, D) to the inputs of the two projections.

    A fusion of another package derives from this class, and has the same arguments.
    """

    def __init__(self, dim: int, num_frames: int) -> None:
        super().__init__()
        self.dim, self.num_frames = dim, num_frames

    @property
    def width(self) -> int:
        """Size of the pooled frames: by default D."""
        return self.dim

    def forward(self, sound: Tensor | None, frames: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return sound (B, D), None for a network of pictures alone, and pooled frames (B, width)."""
        raise NotImplementedError


class Concat(Fusion):
    """The frames side by side: each has a projection of its own, so that their order counts."""

    @property
    def width(self) -> int:
        """T · D."""
        return self.num_frames * self.dim

    def forward(self, sound: Tensor | None, frames: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the sound as it is, and the frames side by side (B, T · D)."""
        return sound, frames.flatten(1)


class TransformerFusion(Fusion):
    """Transformer of two blocks over the tokens of sound and frames, with learned positions; the mean of its frames."""

    def __init__(self, dim: int, num_frames: int) -> None:
        super().__init__(dim, num_frames)
        self.positions = nn.Parameter(torch.randn(1 + num_frames, dim) * 0.02)
        self.blocks = nn.Sequential(*(_Block(dim, math.gcd(MAX_HEADS, dim)) for _ in range(NUM_BLOCKS)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, sound: Tensor | None, frames: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the mixed sound (B, D) and the mean of the mixed frames (B, D)."""
        tokens = frames if sound is None else torch.cat([sound[:, None].to(frames), frames], dim=1)
        mixed = self.norm(self.blocks(tokens + self.positions[-tokens.shape[1] :]))
        return None if sound is None else mixed[:, 0], mixed[:, -self.num_frames :].mean(dim=1)


class _Block(nn.Module):
    """Pre-norm block: self-attention, then a layer of four times the width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(tokens)).chunk(3, dim=2)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(attended)
        mixed: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return mixed


BUILT_IN: dict[str, type[Fusion] | None] = {"attention": None, "transformer": TransformerFusion, "concat": Concat}


def fusion_class(name: str) -> type[Fusion] | None:
    """Return the class of a fusion: built in, None for the attention alone, or of a plug-in.

    Raises ConfigError as `load_plug_in` does, and for a plug-in that is no fusion.
    """
    if name in BUILT_IN:
        check_name("model.fusion", name, "fusions", BUILT_IN)
        return BUILT_IN[name]
    found = load_plug_in("model.fusion", name, "fusions", BUILT_IN)
    if not (isinstance(found, type) and issubclass(found, Fusion)):
        raise ConfigError(f"model.fusion: the plug-in {name!r} is no class derived from {__name__}.Fusion")
    return found
