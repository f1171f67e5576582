"""Branches: projections of a step's own above shared layers, for a network that grows with the class stream.

Source: Zhou et al. 2023 (MEMO, arXiv 2205.13218), there the last stage of a residual network.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avcil_dist.models.heads import LinearHead


class Branches(nn.Module):
    """Frozen projections of all earlier steps, and an auxiliary head on those of the newest step.

    The newest projections are the network's own. The auxiliary head has an output for all old classes together, and
    one for each new class; at step 0 there is none.
    """

    def __init__(self, projections: Mapping[str, nn.Linear], num_earlier: int, num_new: int) -> None:
        """Make random branches of `num_earlier` steps, each with layers like `projections` by their names."""
        super().__init__()
        self.earlier = nn.ModuleList()
        self.auxiliary: LinearHead | None = None
        for _ in range(num_earlier):
            self._add(projections)
        if num_earlier:
            self._renew_auxiliary(projections, num_new)

    @property
    def count(self) -> int:
        """Number of branches, with the newest one."""
        return len(self.earlier) + 1

    def grow(self, projections: Mapping[str, nn.Linear], num_new: int) -> None:
        """Keep a frozen copy of the projections, for a step of `num_new` classes that trains them further."""
        self._add(projections)
        self._renew_auxiliary(projections, num_new)

    def join(self, name: str, inputs: Tensor, newest: Tensor) -> Tensor:
        """Return the features (B, count · D) of one modality: those of the earlier branches, then the `newest`."""
        return torch.cat([*(torch.relu(branch[name](inputs)) for branch in self._earlier()), newest], dim=1)

    def _earlier(self) -> list[nn.ModuleDict]:
        return [branch for branch in self.earlier if isinstance(branch, nn.ModuleDict)]

    def _add(self, projections: Mapping[str, nn.Linear]) -> None:
        branch = nn.ModuleDict({name: copy.deepcopy(layer) for name, layer in projections.items()})
        self.earlier.append(branch.requires_grad_(False))

    def _renew_auxiliary(self, projections: Mapping[str, nn.Linear], num_new: int) -> None:
        layer = next(iter(projections.values()))
        weight = layer.weight
        self.auxiliary = LinearHead(layer.out_features, 1 + num_new, device=weight.device, dtype=weight.dtype)
