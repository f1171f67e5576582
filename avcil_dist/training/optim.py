"""Optimizer, learning rates and loss scale of a step.

The learning rate of each parameter is constant over the step. A schedule would be a pure function
of the iteration, applied to the optimizer's groups here, so that nothing of it goes into a snapshot.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avcil_dist.config.schema import OptimConfig
from avcil_dist.models.encoders.base import Transformer

STEPS_TO_GROW = 2000  # without overflow, after Micikevicius et al. 2018


def build_optimizer(network: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Adam over the trainable parameters of `network`, weight decay as L2."""
    return torch.optim.Adam(parameter_groups(network, optim), weight_decay=optim.weight_decay, fused=True)


def parameter_groups(network: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters grouped by learning rate, highest first, each group in the network's order.

    Layer-wise decay: a parameter at depth d of a transformer (see `Transformer.depths`) has the learning rate
    lr · layer_decay^d; all others have lr. Source: Bao et al. 2022 (BEiT, appendix), and the fine-tuning of
    masked autoencoders.
    """
    depths: dict[nn.Parameter, int] = {}
    if optim.layer_decay < 1:
        for module in network.modules():
            if isinstance(module, Transformer):
                depths |= module.depths()
    at_depth: dict[int, list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            at_depth.setdefault(depths.get(parameter, 0), []).append(parameter)
    return [{"params": at_depth[depth], "lr": optim.lr * optim.layer_decay**depth} for depth in sorted(at_depth)]


@dataclass
class LossScale:
    """Scale of the loss in fp16: as large as possible without overflow of the gradients. Equal on all ranks.

    An overflow halves it; 2,000 optimizer steps without overflow double it.
    """

    value: float = 2.0**16
    num_good: int = 0

    @property
    def is_smallest(self) -> bool:
        """Whether the scale cannot be halved any more: an overflow then comes from the gradient itself."""
        return self.value <= 1

    def update(self, *, overflowed: bool) -> None:
        """Adjust the scale after an optimizer step."""
        if overflowed:
            self.value, self.num_good = max(1.0, self.value / 2), 0
        elif self.num_good + 1 == STEPS_TO_GROW:
            self.value, self.num_good = self.value * 2, 0
        else:
            self.num_good += 1
