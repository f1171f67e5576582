"""Moving average of the trained weights, which is evaluated and kept instead of the last weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avcil_dist.streams.tensor_parts import Parts, cut, flat_view, share
from avcil_dist.world import World


class WeightAverage:
    """Exponential moving average of a network's trainable parameters; each rank has its share of it.

    After update n (from 1) the average is d · average + (1 - d) · weights, d = min(decay, (1 + n) / (10 + n)), so that
    the first weights are soon forgotten. Polyak and Juditsky 1992; the warm-up of the decay as in TensorFlow's
    ExponentialMovingAverage. The parameters must be whole on every rank (ZeRO 0-2), of one type, and contiguous.
    """

    def __init__(self, network: nn.Module, decay: float, world: World, saved: Parts | None = None) -> None:
        """Start from the network's weights, or from this rank's share of the average of the same network."""
        self.decay = decay
        self._world = world
        self._weights = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self._average = {key: values.clone() for key, values in self._own().items()}
        for key, values in (saved or {}).items():
            self._average[key].copy_(values)

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Add the weights after `count` iterations of the step."""
        decay = min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(self._average.values()), list(self._own().values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the average as its weights while the block runs. All ranks call it.

        An error of the block ends the step: the weights stay as they are, because other ranks may not be here.
        """
        own = {key: values.clone() for key, values in self._own().items()}
        self._spread(self._average)
        yield
        self._spread(own)

    def parts(self) -> Parts:
        """Return this rank's parts of the average, by name of the parameter: valid until the next update."""
        return self._average

    def _own(self) -> dict[str, Tensor]:
        """Return this rank's share of the weights: views. ZeRO may have moved them since the last call."""
        return cut(self._weights, self._world.rank, self._world.size)

    @torch.no_grad()
    def _spread(self, parts: Mapping[str, Tensor]) -> None:
        """Write the shares of all ranks into the parameters, in place: ZeRO holds views of them."""
        sizes = {name: value.numel() for name, value in self._weights.items()}
        like = next(iter(self._weights.values()))
        for rank in range(self._world.size):
            ranges = share(sizes, rank, self._world.size)
            if not ranges:
                continue
            if rank == self._world.rank:
                flat = torch.cat(list(parts.values()))
            else:
                flat = like.new_empty(sum(count for _, count in ranges.values()))
            if self._world.size > 1:
                dist.broadcast(flat, src=rank)
            pieces = flat.split([count for _, count in ranges.values()])
            for (name, (start, count)), piece in zip(ranges.items(), pieces, strict=True):
                flat_view(self._weights[name])[start : start + count].copy_(piece)
