"""State of the optimizer as parts of whole tensors, which do not depend on the number of ranks or the ZeRO stage.

Names are those of the parameters behind that of the state: `exp_avg/classifier.weight`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from avcil_dist.errors import ArtifactError
from avcil_dist.streams.tensor_parts import RESTART, Assembly, Parts, Target, flat_view, part_key, split_key
from avcil_dist.training.deepspeed_private import Place

STEP = "step"  # the number of updates, a scalar


def optimizer_parts(optimizer: torch.optim.Optimizer, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return the state of the parameters with `places`: views, valid until the next step."""
    parts = {}
    for name, (tensor, offset, start, count) in places.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            if key == STEP:
                parts[part_key(f"{key}/{name}", 0)] = value.detach().reshape(1)
            elif value is not None:
                parts[part_key(f"{key}/{name}", start)] = value.detach().reshape(-1)[offset : offset + count]
    return parts


def load_optimizer_parts(
    optimizer: torch.optim.Optimizer,
    places: Mapping[str, Place],
    sizes: Mapping[str, int],
    files: Iterable[Parts],
    source: str,
) -> None:
    """Fill the state of a fresh optimizer from parts; `files` are read until all of it is there.

    `sizes` are the numbers of elements of all parameters. Parameters without a part begin anew: they were never
    updated. Tensors of several parameters have the largest number of updates of these. Raises ArtifactError, naming
    `source`, for parts of another optimizer or network, and for a state that is incomplete.
    """
    kinds = ("momentum_buffer",) if isinstance(optimizer, torch.optim.SGD) else ("exp_avg", "exp_avg_sq")
    tensors = {id(place.tensor): place.tensor for place in places.values()}
    states = {key: {kind: torch.zeros_like(tensor) for kind in kinds} for key, tensor in tensors.items()}
    targets = {
        f"{kind}/{name}": Target(flat_view(states[id(tensor)][kind])[offset : offset + count], start, sizes[name])
        for name, (tensor, offset, start, count) in places.items()
        for kind in kinds
    }
    assembly = Assembly(targets, source, elsewhere={f"{kind}/{name}" for kind in kinds for name in sizes})
    steps: dict[str, float] = {}
    for parts in files:
        steps |= _steps(parts, sizes, source)
        assembly.add({key: values for key, values in parts.items() if not _is_step(key)})
        if not assembly.missing():
            break
    begun = {name for name in places if not all(assembly.is_empty(f"{kind}/{name}") for kind in kinds)}
    assembly.check_complete({f"{kind}/{name}" for kind in kinds for name in begun})
    for key, tensor in tensors.items():
        names = [name for name in begun if places[name].tensor is tensor]
        if not names:
            continue
        state: dict[str, Any] = dict(states[key])
        if counts := [steps[name] for name in names if name in steps]:
            state[STEP] = torch.tensor(max(counts), dtype=torch.float32, device=tensor.device)
        elif not isinstance(optimizer, torch.optim.SGD):
            raise ArtifactError(f"{source}: {names[0]} has no number of updates; {RESTART}")
        optimizer.state[tensor] = state


def _is_step(key: str) -> bool:
    return key.startswith(f"{STEP}/")


def _steps(parts: Parts, sizes: Mapping[str, int], source: str) -> dict[str, float]:
    """The numbers of updates among `parts`, by parameter."""
    steps = {}
    for key, value in parts.items():
        if not _is_step(key):
            continue
        name = split_key(key, source)[0].removeprefix(f"{STEP}/")
        if name not in sizes or value.numel() != 1:
            raise ArtifactError(f"{source}: {key} is not of this network and optimizer; {RESTART}")
        steps[name] = float(value)
    return steps
