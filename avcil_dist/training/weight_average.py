"""Moving average of the trained weights, which is evaluated and kept instead of the last weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a network's trainable parameters. Equal on all ranks, as the weights are.

    After update n (from 1) the average is d · average + (1 - d) · weights, d = min(decay, (1 + n) / (10 + n)), so that
    the first weights are soon forgotten. Polyak and Juditsky 1992; the warm-up of the decay as in TensorFlow's
    ExponentialMovingAverage. The parameters must be whole on every rank (ZeRO 0-2).
    """

    def __init__(self, network: nn.Module, decay: float, saved: Mapping[str, Tensor] | None = None) -> None:
        """Start from the network's weights, or from the `saved` state of an average of the same network."""
        self.decay = decay
        self._weights = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self._average = {name: value.detach().clone() for name, value in self._weights.items()}
        for name, value in (saved or {}).items():
            self._average[name].copy_(value)

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Add the weights after `count` iterations of the step."""
        decay = min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the average as its weights while the block runs."""
        weights = {name: value.detach().clone() for name, value in self._weights.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(weights)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the average in host memory, by name of the parameter."""
        return {name: value.cpu().clone() for name, value in self._average.items()}

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        """Write into the parameters in place: ZeRO holds views of them."""
        for name, parameter in self._weights.items():
            parameter.copy_(values[name])
