"""Parts of tensors: the shares of any number of ranks make the whole, and what is no part of it is refused."""

import pytest
import torch
from torch import Tensor

from avcil_dist.errors import ArtifactError
from avcil_dist.streams.tensor_parts import Assembly, Target, cut, flat_view, share

WHOLE = {
    "weight": torch.arange(35.0).reshape(5, 7),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(8),
    "a/b": torch.arange(4),
}


def targets(tensors: dict[str, Tensor]) -> dict[str, Target]:
    return {name: Target(flat_view(value), 0, value.numel()) for name, value in tensors.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_the_shares_of_any_number_of_ranks_are_the_whole(count: int) -> None:
    copies = {name: torch.full_like(value, -1) for name, value in WHOLE.items()}
    assembly = Assembly(targets(copies), "here")
    sizes = []
    for rank in range(count):
        parts = cut(WHOLE, rank, count)
        sizes.append(sum(map(len, parts.values())))
        assembly.add(parts)
    assembly.check_complete()
    assert sum(sizes) == 40
    assert max(sizes) - min(sizes) <= 1
    assert all(torch.equal(copies[name], value) for name, value in WHOLE.items())


def test_a_target_takes_its_range_from_parts_that_are_cut_otherwise() -> None:
    start, length = share({"weight": 35}, 1, 3)["weight"]
    own = torch.zeros(length)
    assembly = Assembly({"weight": Target(own, start, 35)}, "here", elsewhere={"none", "scalar", "a/b"})
    for rank in range(4):
        assembly.add(cut(WHOLE, rank, 4))
    assembly.check_complete()
    assert own.tolist() == list(range(start, start + length))


def assemble(parts: dict[str, Tensor]) -> None:
    assembly = Assembly(targets({"weight": torch.zeros(5, 7)}), "here")
    assembly.add(parts)
    assembly.check_complete()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight/0": torch.zeros(34)}, "weight is incomplete or has another shape"),
        ({"weight/1": torch.zeros(35)}, "weight has another shape"),
        ({"weight/0": torch.zeros(35, dtype=torch.float64)}, "weight is of another type"),
        ({"weight/0": torch.zeros(5, 7)}, "weight is of another type"),
        ({"other/0": torch.zeros(35)}, "other is not of this network"),
        ({"weight": torch.zeros(35)}, "weight is no part"),
        ({"/0": torch.zeros(35)}, "/0 is no part"),
        ({"weight/-1": torch.zeros(35)}, "weight/-1 is no part"),
        ({f"weight/{'9' * 5000}": torch.zeros(35)}, "is no part"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArtifactError, match=f"here: .*{message}.*--restart-step"):
        assemble(parts)
