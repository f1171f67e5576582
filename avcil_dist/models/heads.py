"""Classifiers that grow with the class stream."""

import torch
from torch import nn


class LinearHead(nn.Linear):
    """One row and one bias a class, in the order of arrival."""

    def __init__(
        self, dim: int, num_classes: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, num_classes, device=device, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """How many classes the head knows."""
        return self.out_features


def grow(head: LinearHead, num_classes: int) -> LinearHead:
    """A new head for `num_classes` classes: old rows and biases as they were, new ones freshly drawn.

    New rows are nn.Linear's default initialisation from torch's global generator; their spread depends on
    the dimension alone, so the size of the head leaves no mark on them. Raises ValueError when the head would shrink.
    """
    old = head.num_classes
    if num_classes < old:
        raise ValueError(f"a head of {old} classes cannot grow to {num_classes}")
    grown = LinearHead(head.in_features, num_classes, device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        grown.weight[:old] = head.weight
        grown.bias[:old] = head.bias
    return grown
