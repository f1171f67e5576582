"""Booster: a module whose logits add to those of the previous step's network, beside the network that both teach.

Source: Wang et al. 2022 (FOSTER, arXiv 2204.04662), there a whole backbone, trained before the compressed network.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avcil_dist.models.heads import LinearHead
from avcil_dist.models.outputs import sum_present


class Booster(nn.Module):
    """Projections of their own, and two heads on their sum: the residual of the logits, and a head by itself."""

    def __init__(self, projections: Mapping[str, nn.Linear], num_classes: int) -> None:
        """Begin with copies of `projections`, by their names, and random heads."""
        super().__init__()
        self.layers = nn.ModuleDict({name: copy.deepcopy(layer) for name, layer in projections.items()})
        weight = next(iter(projections.values())).weight
        heads = (LinearHead(len(weight), num_classes, weight.device, weight.dtype) for _ in range(2))
        self.residual, self.own = heads

    def forward(self, sound: Tensor | None, pooled: Tensor | None) -> Tensor:
        """Return the logits (B, 2C) of both heads, side by side, from the inputs of the projections."""
        parts = {"audio_proj": sound, "visual_proj": pooled}
        audio, visual = (None if part is None else torch.relu(self.layers[name](part)) for name, part in parts.items())
        feature = sum_present(audio, visual)
        return torch.cat([self.residual(feature), self.own(feature)], dim=1)
