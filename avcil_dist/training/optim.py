"""Optimizer, learning rates and loss scale of a step.

The schedule is a pure function of the iteration, so nothing of it goes into a snapshot.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avcil_dist.config.optim import OptimConfig
from avcil_dist.models.encoders.base import Transformer
from avcil_dist.models.network import HeadedNetwork, Network

STEPS_TO_GROW = 2000  # without overflow, after Micikevicius et al. 2018


def build_optimizer(network: Network, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `optim.name` over the trainable parameters of `network`, in torch's fused form."""
    groups = parameter_groups(network, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    return (torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam)(groups, lr=optim.lr, fused=True)


def parameter_groups(network: Network, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of equal learning rate and weight decay, each in the network's order.

    Layer-wise decay: a parameter at depth d of a transformer (see `Transformer.depths`) has the learning rate
    lr · layer_decay^d; all others have lr, those of the classifier `head_lr` if it is set. Source: Bao et al. 2022
    (BEiT, appendix), and the fine-tuning of masked autoencoders. With `decay=matrices`, vectors and scalars (biases
    and norms) have no weight decay. Order: by depth, the classifier last, parameters without decay after the others.
    """
    depths: dict[nn.Parameter, int] = {}
    if optim.layer_decay < 1:
        for module in network.modules():
            if isinstance(module, Transformer):
                depths |= module.depths()
    classifier: set[nn.Parameter] = set()
    if optim.head_lr is not None and isinstance(network, HeadedNetwork):
        classifier = set(network.classifier.parameters())
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            has_no_decay = optim.decay == "matrices" and parameter.ndim < 2
            key = parameter in classifier, depths.get(parameter, 0), has_no_decay
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[key],
            "lr": (optim.head_lr or optim.lr) if in_classifier else optim.lr * optim.layer_decay**depth,
            "weight_decay": 0.0 if has_no_decay else optim.weight_decay,
        }
        for key in sorted(groups)
        for in_classifier, depth, has_no_decay in [key]
    ]


def lr_factor(optim: OptimConfig, iteration: int, per_epoch: int) -> float:
    """Return the factor of all learning rates at an iteration (from 0) of a step with `per_epoch` iterations an epoch.

    The first iteration of a warm-up of n has 1/n, its last one 1. `cosine` (Loshchilov and Hutter 2017, without
    restarts) and `linear` begin after the warm-up and would reach `final_lr_fraction` one iteration after the last.
    """
    warmup = round(optim.warmup_epochs * per_epoch)
    if iteration < warmup:
        return (iteration + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "multistep":
        return optim.lr_drop ** bisect.bisect_right(optim.milestones, iteration // per_epoch)
    progress = (iteration - warmup) / (optim.epochs * per_epoch - warmup)
    share = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * share


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
