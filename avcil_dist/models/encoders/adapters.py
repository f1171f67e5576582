"""Low-rank adapters of linear layers (LoRA): W + BA, W frozen, A (rank, inputs) and B (outputs, rank) trained.

B begins as zeros, so the layer begins as it was. Merged adapters are weights W + BA of an ordinary layer. Source: Hu et
al. 2022 (arXiv 2106.09685), there on queries and values; all linear layers as in Dettmers et al. 2023 (2305.14314).
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOWN, UP = "lora_down.weight", "lora_up.weight"  # ends of the names of A and B


class AdaptedLinear(nn.Linear):
    """Linear layer with an adapter. It has the weight and bias of `layer`, under their names."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return Wx + b + BAx."""
        adapted: Tensor = self.lora_up(self.lora_down(inputs))
        return F.linear(inputs, self.weight, self.bias) + adapted


def add_adapters(blocks: Iterable[nn.Module], rank: int) -> None:
    """Replace each linear layer of the blocks by one with an adapter."""
    for block in blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, AdaptedLinear(layer, rank))


def has_adapters(state_keys: Collection[str]) -> bool:
    """Whether a state with these keys has adapters that are not merged."""
    return any(key.endswith(UP) for key in state_keys)


@torch.no_grad()
def merge_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state whose adapters are part of the weights; one without adapters unchanged."""
    merged = {key: value for key, value in state.items() if not key.endswith((DOWN, UP))}
    for key, up in state.items():
        if key.endswith(UP):
            layer = key.removesuffix(UP)
            merged[f"{layer}weight"] = state[f"{layer}weight"] + up @ state[f"{layer}{DOWN}"]
    return merged
