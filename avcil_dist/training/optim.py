"""Which learning rate each parameter has: lower in a transformer the further it lies below the top.

Source: layer-wise decay as in Bao et al. 2022 (BEiT, appendix) and the fine-tuning of masked autoencoders.
"""

from typing import Any

from torch import nn

from avcil_dist.config.schema import OptimConfig
from avcil_dist.models.encoders.base import Transformer


def parameter_groups(network: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters by learning rate, highest first, each in one group and in the network's order.

    A parameter at depth d of a transformer (see `Transformer.depths`) has lr · layer_decay^d; all else, lr.
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
