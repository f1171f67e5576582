"""Weights of a network on the ranks: whole, or as the parts that each rank holds."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.models.network import Network
from avcil_dist.streams.tensor_parts import Parts, cut, flat_view, part_key, split_key
from avcil_dist.training.collectives import gather_json
from avcil_dist.training.deepspeed_private import is_partitioned, partition
from avcil_dist.training.node_tensors import Form, node_tensors
from avcil_dist.world import World


def whole_forms(network: Network) -> dict[str, Form]:
    """Return the forms of a network's weights and buffers, which must not be partitioned, by name."""
    return {name: Form.of(value) for name, value in network.state_dict().items()}


def whole_state(network: Network) -> dict[str, Tensor]:
    """Return a copy of a network's weights and buffers in host memory. At ZeRO 3 all ranks must call it."""
    state = {}
    for name, value in network.state_dict(keep_vars=True).items():
        with _whole(value):
            state[name] = value.detach().cpu().clone()
    return state


def weight_parts(network: Network, world: World) -> dict[str, Tensor]:
    """Return this rank's parts of a network's weights and buffers: views. The parts of all ranks are the whole.

    At ZeRO 3 they are the partitions; otherwise equal shares. Rank 0 has all buffers.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    whole, parts = {}, {}
    for name, value in network.state_dict(keep_vars=True).items():
        if name not in parameters:
            if world.is_main:
                parts[part_key(name, 0)] = value.detach().reshape(-1)
        elif is_partitioned(value):
            start, values = partition(value, world.rank)
            if len(values):  # the last ranks may have padding alone
                parts[part_key(name, start)] = values
        else:
            whole[name] = value
    return parts | cut(whole, world.rank, world.size)


def begin_copy(parts: Parts) -> Callable[[], dict[str, Tensor]]:
    """Begin a copy of `parts` to host memory; the returned function waits for it and returns it.

    From a GPU the copy runs in the order of its stream: training may continue, and does not change what is copied.
    """
    on_gpu = any(value.is_cuda for value in parts.values())
    copies = {
        key: torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)
        for key, value in parts.items()
    }
    copied = torch.cuda.current_stream().record_event() if on_gpu else None

    def result() -> dict[str, Tensor]:
        if copied is not None:
            copied.synchronize()
        return copies

    return result


def to_host(parts: Parts) -> dict[str, Tensor]:
    """Return a copy of `parts` in host memory."""
    return begin_copy(parts)()


def gather_whole(parts: Parts, forms: Mapping[str, Form], device: torch.device, world: World) -> dict[str, Tensor]:
    """Return the whole tensors of all ranks' `parts`, in host memory that the ranks of a node share: not to be changed.

    They are sent one part at a time through `device`, so no rank has more than one part beside them.
    """
    state, is_own = node_tensors(forms, world)
    listed: list[list[tuple[str, int]]] = gather_json([(key, len(value)) for key, value in parts.items()])
    for rank, entries in enumerate(listed):
        for key, count in entries:
            name, start = split_key(key, "weights")
            place = flat_view(state[name])[start : start + count]
            if not count:
                continue
            if world.size == 1:
                place.copy_(parts[key])
                continue
            sent = parts[key].to(device) if rank == world.rank else place.new_empty(count, device=device)
            dist.broadcast(sent, src=rank)
            if is_own:
                place.copy_(sent)
    gather_json(None)  # until then they are not whole
    return state


@contextmanager
def _whole(value: Tensor) -> Iterator[None]:
    """Gather a tensor that ZeRO 3 may have partitioned while the block runs, one at a time to save memory."""
    if not is_partitioned(value):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([value]):
        yield
