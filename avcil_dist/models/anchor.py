"""Anchor: fixed linear scores of a clip's tokens, which a network adds to the logits of its trained head.

Its weights are those of a head in closed form. They are buffers: no optimizer changes them, and artifacts have them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.models.encoders.base import Encoder

SHORTEST = 1e-6  # length of a token that is scaled to length 1; shorter ones, such as zeros, stay shorter


class Anchor(nn.Module):
    """Scores φᵀW (B, C) of the features φ (B, F): sound, pooled pictures, each token of length 1, a constant 1.

    `visual_encoder` and `audio_encoder` are frozen copies of encoders that the network trains; None where the network's
    own encoder is fixed.
    """

    def __init__(
        self,
        num_cells: int,
        num_features: int,
        num_classes: int,
        *,
        visual_encoder: Encoder | None = None,
        audio_encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.num_cells = num_cells
        self.visual_encoder = visual_encoder
        self.audio_encoder = audio_encoder
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(num_features, num_classes))

    def set_weights(self, weights: Tensor) -> None:
        """Set W (F, C), of more classes than before or as many."""
        self.weights = weights.to(self.weights)

    @torch.no_grad()
    def forward(
        self, visual: Tensor | None, audio: Tensor | None, tokens: Tensor | None, sound: Tensor | None
    ) -> Tensor:
        """Return the scores (B, C), float32.

        `visual` and `audio` are the network's inputs, `tokens` (B, T, S, D) and `sound` (B, D) its encodings of them;
        None without the modality.
        """
        if self.visual_encoder is not None:
            tokens = self.visual_encoder(visual)
        if self.audio_encoder is not None:
            sound = self.audio_encoder(audio)
        cells = None if tokens is None else pool_tokens(tokens, (self.num_cells, 1))
        with torch.autocast(self.weights.device.type, enabled=False):
            return with_constant(token_features(sound, cells, unit_length=True)) @ self.weights


def pool_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean of each cell of a grid of frames × positions, (B, cells, D) float32, of tokens (B, T, S, D).

    A grid finer than the tokens is reduced to theirs, because repeated tokens would add no information.
    """
    grid = (min(grid[0], tokens.shape[1]), min(grid[1], tokens.shape[2]))
    cells = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2).float(), grid).permute(0, 2, 3, 1)
    return cells.flatten(1, 2)


def token_features(audio: Tensor | None, visual: Tensor | None, *, unit_length: bool) -> list[Tensor]:
    """Return the features (B, width), float32, of sound (B, D) and of pictures (B, cells, D), if present."""
    found = []
    for part in (audio, visual):
        if part is not None:
            tokens = part.float()
            tokens = F.normalize(tokens, dim=-1, eps=SHORTEST) if unit_length else tokens
            found.append(tokens.flatten(1))
    return found


def with_constant(features: Sequence[Tensor]) -> Tensor:
    """Return the features side by side and a constant 1, (B, F)."""
    return F.pad(torch.cat(list(features), dim=1), (0, 1), value=1.0)
