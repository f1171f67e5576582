"""Everything of DeepSpeed that this program uses beyond its documented interface. Each function has the reason.

No other file may touch such a name; `tests/unit/test_deepspeed_interface.py` checks that. Proven with the version that
`requirements.lock` pins.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """Place of a parameter in the optimizer, on this rank.

    Its elements `start` … `start + length - 1` are those from `offset` on of the flattened `tensor`, one of the
    optimizer's own parameters.
    """

    tensor: Tensor
    offset: int
    start: int
    length: int


def zero_places(
    engine: Any, stage: int, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], rank: int
) -> dict[str, Place]:
    """Return the places of the parameters that ZeRO 1, 2 or 3 gave this rank, by name.

    Reason: the documented accessors cannot fill the state of an engine that has not made a step
    (`safe_set_full_optimizer_state`, `safe_set_local_optimizer_state`), and those of ZeRO 1 and 2 send each whole
    tensor to every rank (`safe_get_full_optimizer_state` is an all-reduce). With the places, the state itself is read
    and written through torch's `optimizer.state`, and a snapshot needs no communication.
    Names: `_hp_mapping`, and at ZeRO 3 `grad_position`, `get_param_id`, `fp32_partitioned_groups_flat`, `ds_numel`.
    """
    places = {}
    for name, parameter in parameters.items():
        whole: Any = parameter
        if stage == 3:
            zero: Any = engine.optimizer
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * size
            length = min(size, whole.ds_numel - start)  # the last ranks have less: padding
            place = Place(zero.fp32_partitioned_groups_flat[group], offset, start, length)
        else:
            mapping = whole._hp_mapping
            if mapping is None:
                continue
            own, flat = mapping.hp_fragment_address, optimizer.param_groups[mapping.param_group_index]["params"][0]
            place = Place(flat, own.start, mapping.lp_fragment_address.start, own.numel)
        if place.length > 0:
            places[name] = place
    return places


def is_partitioned(value: Tensor) -> bool:
    """Whether ZeRO 3 has partitioned a parameter over the ranks. Reason: no documented test. Name: `ds_id`."""
    return hasattr(value, "ds_id")


def partition(value: Any, rank: int) -> tuple[int, Tensor]:
    """Return first element and elements (n,) of this rank's partition of a parameter at ZeRO 3, without padding.

    Reason: `safe_get_local_fp32_param` is for trained parameters only. Names: `ds_tensor`, `ds_numel`.
    """
    local: Tensor = value.ds_tensor.detach().reshape(-1)
    start = min(rank * local.numel(), value.ds_numel)
    return start, local[: value.ds_numel - start]


def covered_parameters(engine: Any, stage: int) -> Iterable[nn.Parameter]:
    """Return the parameters that ZeRO's optimizer updates.

    Reason: a parameter that was added later would silently stay as it is. Names: `bit16_groups`, `fp16_groups`.
    """
    groups = getattr(engine.optimizer, "fp16_groups" if stage == 3 else "bit16_groups")
    return [parameter for group in groups for parameter in group]


def set_loss_scale(engine: Any, scale: float) -> None:
    """Set the loss scale of ZeRO's optimizer.

    Reason: DeepSpeed's own scale is not equal on all ranks after a resume. Name: `override_loss_scale`.
    """
    engine.optimizer.override_loss_scale(scale)


def has_overflowed(engine: Any) -> bool:
    """Whether ZeRO's optimizer skipped its last step. Reason: `step` does not return it. Name: `overflow`."""
    return bool(engine.optimizer.overflow)


def clear_gradients(engine: Any) -> None:
    """Clear the gradients that ZeRO 3 keeps.

    Reason: a parameter that the next iteration does not use would be updated with this gradient again.
    Name: `grad_partitions_flat_buffer`.
    """
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def forget(engine: Any) -> None:
    """Remove an engine from a global stack of ZeRO 3, which would keep it and its network alive.

    Reason: `destroy` does not. Name: `FWD_MODULE_STACK`.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]


def disable_compiled_all_reduce(deepspeed: Any) -> None:
    """Disable an all-reduce for inference only, by an empty table of the operations that can be compiled.

    Reason: every new process would compile it, and to make the table it runs compilers and looks for GPUs.
    Name: `__compatible_ops__`.
    """
    deepspeed.ops.__compatible_ops__ = {}
