"""Tensors in memory that the ranks of a node share: one copy for each node instead of one for each rank."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from avcil_dist.data.shared_memory import SharedMemory
from avcil_dist.errors import AvcilError
from avcil_dist.training.collectives import gather_json
from avcil_dist.training.error_codec import decode_error, encode_error
from avcil_dist.world import World

ALIGNMENT = 64  # bytes; whole cache lines


class Form(NamedTuple):
    """Shape and type of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor of this form."""
        return math.prod(self.shape) * self.dtype.itemsize


class NodeTensors(NamedTuple):
    """Tensors by name, and whether this rank has to fill them: the first of a node, and one that cannot share."""

    tensors: dict[str, Tensor]
    is_own: bool


def node_tensors(forms: Mapping[str, Form], world: World) -> NodeTensors:
    """Return new tensors with these forms, shared by the ranks of each node. All ranks call it.

    They must not be changed once all ranks have them. A rank that cannot map the memory of its node's first one, for
    example in another container, has its own.
    """
    if world.local_size == 1:
        return NodeTensors({name: torch.empty(form.shape, dtype=form.dtype) for name, form in forms.items()}, True)
    places, size = {}, 0
    for name, form in forms.items():
        places[name] = size
        size += -(-form.nbytes // ALIGNMENT) * ALIGNMENT
    memory = None
    if world.local_rank == 0:
        with suppress(OSError):  # a limit on the size of files applies to this memory too
            memory = SharedMemory(max(size, 1))
    paths: list[str] = gather_json(memory.path if memory else "")
    is_own = memory is not None
    if memory is None:
        with suppress(OSError):
            memory = SharedMemory(max(size, 1), paths[world.rank - world.local_rank])
    gather_json(None)  # the path is valid until all have mapped the memory
    data = torch.empty(max(size, 1), dtype=torch.uint8) if memory is None else torch.from_numpy(memory.bytes)
    tensors = {
        name: data[places[name] : places[name] + form.nbytes].view(form.dtype).view(form.shape)
        for name, form in forms.items()
    }
    return NodeTensors(tensors, is_own or memory is None)


def load_on_node(load: Callable[[], dict[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Return the tensors that `load` returns, the same on all ranks; the first rank of each node calls it.

    Raises its AvcilError on all ranks. A rank that cannot share memory calls `load` itself.
    """
    if world.local_size == 1:
        return load()
    loaded: dict[str, Tensor] = {}
    fault = None
    if world.local_rank == 0:
        try:
            loaded = load()
        except AvcilError as error:
            fault = encode_error(error, world.rank)
    forms = [(name, list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in loaded.items()]
    listed: list[tuple[list[tuple[str, list[int], str]], str | None]] = gather_json((forms, fault))
    if faults := [text for _, text in listed if text is not None]:
        raise decode_error(faults[0])
    first, _ = listed[world.rank - world.local_rank]
    shared, is_own = node_tensors(
        {name: Form(tuple(shape), getattr(torch, dtype)) for name, shape, dtype in first}, world
    )
    if is_own:
        for name, value in (loaded or load()).items():
            shared[name].copy_(value)
    gather_json(None)  # until then they are not filled
    return shared
