"""What the ranks of a step say to each other: a process group, gathers with gradient, one decision for all."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from avcil_dist.errors import AvcilError, WorldError
from avcil_dist.world import World

T = TypeVar("T")


def local_device(world: World) -> torch.device:
    """The rank's own GPU where there are any, else the processor. Raises WorldError for more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_size > torch.cuda.device_count():
        raise WorldError(
            f"{world.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; start one for each, or "
            "set CUDA_VISIBLE_DEVICES= to train on the processor"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(world: World, device: torch.device, timeout_minutes: float) -> Iterator[TCPStore]:
    """A process group for the length of one step, and the store by which it met; NCCL between GPUs, gloo otherwise."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store = TCPStore(world.master_addr, world.master_port, world.size, world.is_main, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield store
    finally:
        dist.destroy_process_group()


class Votes:
    """Questions to all ranks, each answered yes when one of them says so.

    Asked of the processors, over gloo: between GPUs, a question must not wait for what they compute.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.get_backend() == "nccl":
            group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def any(self, *answers: bool) -> tuple[bool, ...]:
        """For each question whether any rank says yes."""
        if dist.get_world_size() == 1:
            return answers
        votes = torch.tensor(answers, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return tuple(votes.bool().tolist())

    def total(self, count: int) -> int:
        """The sum of all ranks' counts."""
        if dist.get_world_size() == 1:
            return count
        counts = torch.tensor([count])
        dist.all_reduce(counts, group=self._group)
        return int(counts)


class _AllGather(torch.autograd.Function):
    """Rows of all ranks. Backward gives a rank its own rows' gradient, times the number of ranks.

    Every rank computes the same loss from the gathered rows, and the engine averages parameter
    gradients over ranks: times the number of ranks, that average is the sum, which is the gradient
    of the loss.
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
    """The global batch of `rows` (B, …), with gradient: all ranks' current rows in rank order, then all exemplars.

    Every rank has the same B and `num_current`, so the result (B × ranks, …) has the rows in the
    plan's order.
    """
    if dist.get_world_size() == 1:
        return rows
    gathered = _AllGather.apply(rows) if rows.requires_grad else _all_gather(rows)
    if num_current == len(rows):
        return gathered
    by_rank = gathered.view(dist.get_world_size(), len(rows), *rows.shape[1:])
    return torch.cat([by_rank[:, :num_current].flatten(0, 1), by_rank[:, num_current:].flatten(0, 1)])


def decide_together(decide: Callable[[], T]) -> T:
    """Rank 0 decides; all ranks get its answer, or raise its error."""
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = decide()
        except AvcilError as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    answer: T = message[0]
    return answer


def make_together(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Rank 0 makes a tensor; all ranks get it, on their device, or raise its error."""
    made: list[Tensor] = []

    def describe() -> tuple[tuple[int, ...], torch.dtype]:
        made.append(make().to(device).contiguous())
        return tuple(made[0].shape), made[0].dtype

    shape, dtype = decide_together(describe)
    tensor = made[0] if made else torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(tensor, src=0)
    return tensor


def collect_texts(texts: tuple[str, ...]) -> list[str]:
    """The texts of all ranks, in rank order."""
    collected: list[tuple[str, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(collected, texts)
    return [text for part in collected for text in part]


def _all_gather(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
