"""Collectives of a step: process group, gathers with gradient, votes, decisions of rank 0 for all ranks."""

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from avcil_dist.config.schema import EngineConfig
from avcil_dist.errors import AvcilError, RankError
from avcil_dist.training.error_codec import decode_error, encode_error
from avcil_dist.training.failure_sync import propagate_failures
from avcil_dist.training.rank_environment import set_network_variables
from avcil_dist.training.rendezvous import rendezvous
from avcil_dist.world import World

T = TypeVar("T")


@contextmanager
def process_group(
    world: World, device: torch.device, engine: EngineConfig, trace: str | None = None
) -> Iterator[TCPStore]:
    """Create a process group for one step and yield its store. The backend is NCCL between GPUs, gloo otherwise.

    `engine` holds the time limits. `trace` is the path, without the rank, of the traces that NCCL writes when a
    collective exceeds its limit.

    Raises, on all ranks, WorldError and RankError as `rendezvous` does, and RankError when ranks cannot connect.
    """
    gpu = ""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    set_network_variables(world, device, trace)
    timeout = datetime.timedelta(minutes=engine.timeout_minutes)
    store = rendezvous(world, minutes=engine.meeting_minutes, timeout=timeout, gpu=gpu)
    try:
        with propagate_failures(store, world):
            _join(store, world, device, timeout)
        yield store
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(store: TCPStore, world: World, device: torch.device, timeout: datetime.timedelta) -> None:
    is_cuda = device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if is_cuda else None,
        )
    except RuntimeError as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RankError(
            f"rank {world.rank} cannot connect with the others ({fault}); does a firewall separate the machines? "
            "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) select the network interface"
        ) from error


class Votes:
    """Votes of all ranks: sums and disjunctions of small numbers, and small values of each.

    They use gloo on the CPU: a vote over NCCL would wait for the computations of the GPUs.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.get_backend() == "nccl" and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any rank."""
        if dist.get_world_size() == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return tuple(votes.bool().tolist())

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Return for each value the largest of all ranks."""
        largest = torch.tensor(values, dtype=torch.float64)
        if dist.get_world_size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return [float(value) for value in largest]

    def total(self, count: int) -> int:
        """Return the sum of all ranks' counts."""
        if dist.get_world_size() == 1:
            return count
        counts = torch.tensor([count])
        dist.all_reduce(counts, group=self._group)
        return int(counts)

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, as the function `gather_json` does."""
        return gather_json(value, self._group)


class _AllGather(torch.autograd.Function):
    """Gather of the rows of all ranks. Backward returns the gradient of a rank's own rows, times the number of ranks.

    Every rank computes the same loss from the gathered rows, and the engine averages parameter gradients over ranks.
    With this factor, the average is the sum over ranks, which is the gradient of the loss.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.count = len(rows)
        return _all_gather(rows)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        first = dist.get_rank() * context.count
        return gradients[0][first : first + context.count] * dist.get_world_size()


def gather_rows(rows: Tensor, num_current: int) -> Tensor:
    """Gather `rows` (B, …) of all ranks, with gradient: current rows in rank order, then exemplars in rank order.

    Every rank has the same B and `num_current`, so the result (B × ranks, …) has the order of the plan.
    """
    if dist.get_world_size() == 1:
        return rows
    gathered = _AllGather.apply(rows) if rows.requires_grad else _all_gather(rows)
    if num_current == len(rows):
        return gathered
    by_rank = gathered.view(dist.get_world_size(), len(rows), *rows.shape[1:])
    return torch.cat([by_rank[:, :num_current].flatten(0, 1), by_rank[:, num_current:].flatten(0, 1)])


def broadcast_json(value: Any) -> Any:
    """Return rank 0's `value`, as JSON carries it, on all ranks. Tuples become lists."""
    if dist.get_world_size() == 1:
        return json.loads(json.dumps(value))
    data = _as_bytes(value)
    size = torch.tensor([len(data)], device=data.device)
    dist.broadcast(size, src=0)
    if dist.get_rank():
        data = data.new_empty(int(size))
    dist.broadcast(data, src=0)
    return _from_bytes(data)


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, as JSON carries them, in rank order. Tuples become lists."""
    if dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    data = _as_bytes(value, group)
    sizes = _all_gather(torch.tensor([len(data)], device=data.device), group).tolist()
    parts = _all_gather(torch.nn.functional.pad(data, (0, max(sizes) - len(data))), group).split(max(sizes))
    return [_from_bytes(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def _as_bytes(value: Any, group: dist.ProcessGroup | None = None) -> Tensor:
    """A value's JSON as a tensor (bytes,) on the device of the group's backend."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _from_bytes(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


def decide_together(decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0; all ranks return its result, which JSON can carry, or raise its AvcilError."""
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = decide()
        except AvcilError as error:
            message[1] = encode_error(error, 0)
    result, fault = broadcast_json(message)
    if fault is not None:
        raise decode_error(fault)
    decided: T = result
    return decided


def make_together(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Call `make` on rank 0; all ranks return its tensor on their device, or raise its AvcilError."""
    made: list[Tensor] = []

    def describe() -> tuple[list[int], str]:
        made.append(make().to(device).contiguous())
        return list(made[0].shape), str(made[0].dtype).removeprefix("torch.")

    shape, dtype = decide_together(describe)
    tensor = made[0] if made else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    dist.broadcast(tensor, src=0)
    return tensor


class GroupRanks:
    """Ranks of the process group, as closed-form methods use them. Tensors are on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def add_up(self, values: Tensor) -> None:
        """Replace `values` by their sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(values)

    def share(self, values: Tensor, source: int) -> None:
        """Replace `values`, contiguous, by those of rank `source`."""
        if self.size > 1:
            dist.broadcast(values, src=source)

    def make_together(self, make: Callable[[], Tensor]) -> Tensor:
        """Return `make_together` on the device."""
        return make_together(make, self._device)


def collect_texts(texts: tuple[str, ...]) -> list[str]:
    """Return the texts of all ranks, in rank order."""
    return [text for part in gather_json(texts) for text in part]


def _all_gather(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows, group=group)
    return torch.cat(parts)
