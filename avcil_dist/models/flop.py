"""FLOP of a network's forward and backward pass, counted from the shapes that its modules see. No bit changes.

Counted are matrix products and convolutions: linear layers, convolutions, the products of self-attention, and the keys
of the audio-guided attention. An operation costs its forward once, once more for the gradient of its weights, and once
more for that of its input. Recomputation and a teacher do not count, as in the usual "model FLOP utilisation".
"""

from typing import Any

import torch
from torch import Tensor, nn

from avcil_dist.models.attention.module import AudioGuidedAttention

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FlopCount:
    """Sum of the FLOP of the calls that were counted."""

    def __init__(self) -> None:
        self.total = 0.0

    def add(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Count a call of a module; this is a forward hook of torch."""
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        own = [module.weight] if isinstance(module, nn.Linear) else module.parameters()  # without that of an adapter
        is_trained = any(parameter.requires_grad for parameter in own)
        if not tensors or (is_trained and not torch.is_grad_enabled()):  # the pass without gradient is a recomputation
            return
        has_input_grad = torch.is_grad_enabled() and tensors[-1].requires_grad
        self.total += _forward_flop(module, tensors, output) * (1 + is_trained + has_input_grad)


class CountedFlop:
    """Context in which the calls of a network's modules are counted, in `count`."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.count = network, FlopCount()

    def __enter__(self) -> FlopCount:
        modules = [module for module in self.network.modules() if _is_counted(module)]
        self._hooks = [module.register_forward_hook(self.count.add) for module in modules]
        return self.count

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _is_counted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, AudioGuidedAttention, *CONVOLUTIONS)) or _is_self_attention(module)


def _is_self_attention(module: nn.Module) -> bool:
    """Whether a module of an encoder is the innermost one named Attention, as those of timm and transformers are."""
    names = [type(part).__name__ for part in module.modules()]
    return names[0].endswith("Attention") and not any(name.endswith("Attention") for name in names[1:])


def _forward_flop(module: nn.Module, inputs: list[Tensor], output: Any) -> float:
    """FLOP of one forward pass: two for each multiplication with its addition."""
    last = inputs[-1]
    if isinstance(module, nn.Linear):
        return 2.0 * last.numel() * module.out_features
    if isinstance(module, CONVOLUTIONS):
        in_group = module.in_channels // module.groups
        return 2.0 * output.numel() * in_group * torch.Size(module.kernel_size).numel()
    if isinstance(module, AudioGuidedAttention):  # its linear layer runs inside the fused kernels; `last`: the tokens
        return 2.0 * last.numel() * last.shape[-1]
    return 4.0 * last.numel() * last.shape[-2]  # of (B, n, D): queries with keys, weights with values
