"""Parts of named tensors: the form in which the ranks of a step keep and write tensors that belong to all of them.

A part is a range of a flattened tensor. Its key is `NAME/START`, START the number of its first element. The parts of
all ranks together are the whole tensors, for any number of ranks.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from avcil_dist.errors import ArtifactError

Parts = Mapping[str, Tensor]
RESTART = "begin the step anew with --restart-step"


class Range(NamedTuple):
    """`length` elements of a flattened tensor, from number `start` on."""

    start: int
    length: int


class Target(NamedTuple):
    """Place (n,) for the elements from number `start` on of a tensor that has `total` of them."""

    values: Tensor
    start: int
    total: int


def part_key(name: str, start: int) -> str:
    """Return the key of the part of tensor `name` that begins at element `start`."""
    return f"{name}/{start}"


def split_key(key: str, source: str) -> tuple[str, int]:
    """Return name and first element of a part. Raises ArtifactError, naming `source`, for no such key."""
    name, _, start = key.rpartition("/")
    if not (name and start.isascii() and start.isdigit() and len(start) < 20):
        raise ArtifactError(f"{source}: {key} is no part of a tensor; {RESTART}")
    return name, int(start)


def share(sizes: Mapping[str, int], rank: int, num_ranks: int) -> dict[str, Range]:
    """Return the share of one of `num_ranks` ranks in tensors of these numbers of elements, by name.

    The shares are consecutive ranges of all elements in the order of `sizes`, equal up to one element.
    """
    total = sum(sizes.values())
    first, last = total * rank // num_ranks, total * (rank + 1) // num_ranks
    ranges, position = {}, 0
    for name, count in sizes.items():
        start, stop = max(first - position, 0), min(last - position, count)
        if start < stop:
            ranges[name] = Range(start, stop - start)
        position += count
    return ranges


def cut(tensors: Mapping[str, Tensor], rank: int, num_ranks: int) -> dict[str, Tensor]:
    """Return the parts of `tensors` that are the share of a rank: views, where the tensors are contiguous."""
    ranges = share({name: value.numel() for name, value in tensors.items()}, rank, num_ranks)
    return {
        part_key(name, start): tensors[name].detach().reshape(-1)[start : start + count]
        for name, (start, count) in ranges.items()
    }


def flat_view(tensor: Tensor) -> Tensor:
    """Return a view (n,) of a contiguous tensor, through which it can be written."""
    return tensor.detach().view(-1)


class Assembly:
    """Targets that are filled from parts, by name.

    `elsewhere` are names of tensors without a target, whose parts are passed over. Raises ArtifactError, naming
    `source`, for parts of any other tensor, of another type or beyond the end.
    """

    def __init__(self, targets: Mapping[str, Target], source: str, elsewhere: Collection[str] = ()) -> None:
        self._targets, self._source, self._elsewhere = targets, source, elsewhere
        self._filled: Counter[str] = Counter()

    def add(self, parts: Parts) -> None:
        """Copy the elements of `parts` that have a place in the targets."""
        for key, values in parts.items():
            name, start = split_key(key, self._source)
            target = self._targets.get(name)
            if target is None:
                if name in self._elsewhere:
                    continue
                raise ArtifactError(f"{self._source}: {name} is not of this network and optimizer; {RESTART}")
            if values.ndim != 1 or values.dtype != target.values.dtype:
                raise ArtifactError(f"{self._source}: {name} is of another type; {RESTART}")
            if start + len(values) > target.total:
                raise ArtifactError(f"{self._source}: {name} has another shape; {RESTART}")
            first = max(start, target.start)
            last = min(start + len(values), target.start + len(target.values))
            if first < last:
                place = target.values[first - target.start : last - target.start]
                place.copy_(values[first - start : last - start])
                self._filled[name] += last - first

    def missing(self) -> list[str]:
        """Return the names of targets that are not filled."""
        return [name for name, target in self._targets.items() if self._filled[name] < len(target.values)]

    def is_empty(self, name: str) -> bool:
        """Whether no element of a target is filled."""
        return not self._filled[name]

    def check_complete(self, names: Collection[str] | None = None) -> None:
        """Raise ArtifactError for a target, among `names`, that is not filled."""
        missing = [name for name in self.missing() if names is None or name in names]
        if missing:
            raise ArtifactError(f"{self._source}: {missing[0]} is incomplete or has another shape; {RESTART}")
