import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from avcil_dist.errors import ConfigError, DataError
from avcil_dist.methods import kernel
from avcil_dist.methods.base import OneRank, StepContext
from avcil_dist.methods.row_blocks import solve_in_row_blocks
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.training.collectives import (
    GroupRanks,
    Votes,
    broadcast_json,
    collect_texts,
    decide_together,
    gather_json,
    gather_rows,
    make_together,
)
from avcil_dist.world import World
from tests.helpers.ranks import run_ranks


def _gather_marked_rows(world: World) -> list[int]:
    current = [10 * world.rank, 10 * world.rank + 1]
    exemplars = [100 + world.rank]
    return gather_rows(torch.tensor(current + exemplars), num_current=2).tolist()


def test_gathered_rows_are_all_current_clips_then_all_exemplars() -> None:
    assert run_ranks(_gather_marked_rows, 2) == [[0, 1, 10, 11, 100, 101]] * 2


def _gradient_of_a_global_loss(world: World) -> tuple[float, float]:
    """The loss couples all rows: the square of their weighted sum."""
    weight = torch.tensor(2.0, requires_grad=True)
    rows = weight * torch.tensor([1.0 + world.rank, 3.0 + world.rank])
    everything = gather_rows(rows, num_current=2)
    loss = (everything * torch.arange(1.0, len(everything) + 1)).sum() ** 2
    loss.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)  # what the engine does: the mean over ranks
    return loss.item(), weight.grad.item() / world.size


def test_mean_of_gradients_over_ranks_is_the_gradient_of_the_global_loss() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    loss = (weight * torch.tensor([1.0, 3.0, 2.0, 4.0]) * torch.arange(1.0, 5.0)).sum() ** 2
    loss.backward()
    assert weight.grad is not None
    assert run_ranks(_gradient_of_a_global_loss, 2) == [(loss.item(), weight.grad.item())] * 2


def _votes(world: World) -> tuple[tuple[bool, ...], list[float], int]:
    votes = Votes(timeout_minutes=1)
    any_rank = votes.any(world.rank == 1, False)
    return any_rank, votes.maxima([float(world.rank), -2.5 * world.rank]), votes.total(3 + world.rank)


@pytest.mark.parametrize("size", [1, 2])
def test_votes_are_of_all_ranks(size: int) -> None:
    expected = {1: ((False, False), [0.0, 0.0], 3), 2: ((True, False), [1.0, 0.0], 7)}
    assert run_ranks(_votes, size) == [expected[size]] * size


def _solve(world: World) -> tuple[torch.Tensor, str, torch.Tensor]:
    matrix, targets = _system()
    ranks = GroupRanks(torch.device("cpu"))
    broken = matrix - 1e3 * torch.diag(torch.arange(23) == 22)  # in the last block, which rank 0 has
    with pytest.raises(ConfigError) as raised:
        solve_in_row_blocks(lambda rows: broken[rows, : rows.stop].clone(), targets, ranks, rows=5)
    found = solve_in_row_blocks(lambda rows: matrix[rows, : rows.stop].clone(), targets, ranks, rows=5)
    kernel.ROWS = 5  # so that few clips are several blocks, in this process alone
    return found, str(raised.value), _method().solve_together(ranks)


def _method() -> kernel.Kernel:
    """The kernel method with 23 clips of three classes, before it solves."""
    method, random = kernel.Kernel(kernel.Kernel.Options()), torch.Generator().manual_seed(0)
    method.begin_step(StepContext(Scenario((("a", "b", "c"),)), 0))
    sound, tokens = torch.randn(23, 6, generator=random), torch.randn(23, 2, 6, generator=random)
    method.accumulate(Output(torch.zeros(23, 0), sound, tokens), torch.arange(23) % 3)
    method.statistics()
    return method


def _system() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    factor, targets = (torch.randn(23, width, generator=random, dtype=torch.float64) for width in (30, 3))
    return factor @ factor.T, targets


def test_a_system_in_row_blocks_of_ranks_has_the_solution_of_one_process() -> None:
    matrix, targets = _system()
    expected = np.linalg.solve(matrix.numpy(), targets.numpy())
    (one, fault, weights), (two, fault_of_other, weights_of_other) = run_ranks(_solve, 2)
    np.testing.assert_allclose(one.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(one, two)
    assert fault == fault_of_other
    assert fault.startswith("method.gamma is too small")
    alone = solve_in_row_blocks(lambda rows: matrix[rows, : rows.stop].clone(), targets, OneRank(), rows=5)
    assert torch.equal(alone, one)
    assert torch.equal(weights, weights_of_other)
    torch.testing.assert_close(weights, _method().solve(), rtol=1e-5, atol=1e-6)  # kernels are in float32


def _decide(world: World) -> str:
    return decide_together(lambda: f"decided by {world.rank}")


def test_rank_0_decides_for_all() -> None:
    assert run_ranks(_decide, 2) == ["decided by 0"] * 2


def _decide_with_error(world: World) -> str:
    def fail() -> None:
        raise DataError("shard 7 is gone")

    try:
        decide_together(fail)
    except DataError as error:
        return f"{world.rank}: {error}"
    return "no error"


def test_an_error_of_rank_0_is_raised_on_all_ranks() -> None:
    assert run_ranks(_decide_with_error, 2) == ["0: shard 7 is gone", "1: shard 7 is gone"]


def _exchange(world: World) -> tuple[list[object], object]:
    own = {"rank": world.rank, "text": "é" * 1000 * world.rank, "none": None, "pair": (1, 2.5)}
    return gather_json(own), broadcast_json(own)


def test_values_of_all_ranks_are_exchanged_as_json() -> None:
    values = [{"rank": rank, "text": "é" * 1000 * rank, "none": None, "pair": [1, 2.5]} for rank in range(3)]
    assert run_ranks(_exchange, 3) == [(values, values[0])] * 3


def _make_tensor(world: World) -> tuple[str, list[list[int]]]:
    made = make_together(lambda: torch.full((2, 3), 7 + world.rank, dtype=torch.float64), torch.device("cpu"))
    return str(made.dtype), made.tolist()


def test_a_tensor_of_rank_0_has_its_type_and_shape_on_all_ranks() -> None:
    assert run_ranks(_make_tensor, 2) == [("torch.float64", [[7.0] * 3] * 2)] * 2


def _texts(world: World) -> list[str]:
    return collect_texts((f"rank {world.rank}",) * (world.rank + 1))


def test_texts_of_all_ranks_come_in_rank_order() -> None:
    assert run_ranks(_texts, 2) == [["rank 0", "rank 1", "rank 1"]] * 2


def _fail_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("rank 1 breaks")
    gather_rows(torch.zeros(1), num_current=1)


def test_a_rank_that_breaks_does_not_leave_the_others_waiting() -> None:
    started = time.monotonic()
    with pytest.raises(ProcessRaisedException, match=r"rank 1 breaks|onnection"):
        run_ranks(_fail_on_rank_1, 2)
    assert time.monotonic() - started < 50  # well before the group's timeout of a minute
