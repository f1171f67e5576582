"""Maps of one clip over frames and positions: its attention, and the evidence of its tokens for a class.

With keys and guide bounded by tanh, the attention of a channel varies by a factor of e² at most, and channels disagree:
its mean over channels is almost even. The evidence multiplies the attention by the token and by the effect on the
score of a class, channel by channel, and so shows which part of the picture a prediction is made of.
"""

import math

from torch import Tensor

from avcil_dist.models.attention.module import AudioGuidedAttention
from avcil_dist.models.attention.token_map import TokenMap


def attention_map(weights: Tensor) -> TokenMap:
    """Return the mean over channels of the `weights` (T, S, D) of a clip's tokens in its pooled vector."""
    return _on_grid(weights.double().mean(dim=2))


def evidence_map(weights: Tensor, tokens: Tensor, gradient: Tensor) -> TokenMap:
    """Return the share of each token in the evidence for a class.

    `weights` and `tokens` are (T, S, D), `gradient` (D,), or (T, 1, D) for frames that are pooled one by one, is that
    of the class's score with respect to the pooled vector. Σ weights · tokens · gradient over tokens and channels is
    the linear effect of the picture on the score; the evidence of a token is its positive part, after Zhou et al. 2016
    (class activation mapping).
    """
    evidence = (weights * tokens * gradient).double().sum(dim=2).clamp(min=0)
    total = evidence.sum()
    return _on_grid(evidence / total if total > 0 else evidence)


def token_weights(attention: AudioGuidedAttention, audio: Tensor, visual: Tensor) -> Tensor:
    """Return the weight of each token in the pooled vector, per channel: (B, T, S, D), which sums to 1 over T and S.

    `audio` is (B, D), `visual` (B, T, S, D).
    """
    spatial, temporal = attention.maps(audio, visual)
    return temporal.unsqueeze(2) * spatial


def _on_grid(mass: Tensor) -> TokenMap:
    """Positions (T, S) as a square grid; another number of them is taken as one row."""
    side = math.isqrt(mass.shape[1])
    grid = (side, side) if side * side == mass.shape[1] else (1, mass.shape[1])
    return TokenMap(mass.cpu().numpy().reshape(len(mass), *grid))
