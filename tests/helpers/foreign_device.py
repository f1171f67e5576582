"""A device that is not there: tensors of a pretended GPU, which have values, and refuse to meet those of the processor.

`pretended()` is a context in which `cuda:0` is that device. Its tensors compute on the processor. As on a GPU, an
operation that also gets a tensor of the processor raises RuntimeError, unless that is a scalar or an index, and
`numpy()` raises TypeError. Triton kernels, streams and graphs are not pretended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
# Take values of the processor, as on a GPU; the last compares two tensors, for `Module.to`.
COPIES = {"copy_", "__setitem__", "index_put_", "_has_compatible_shallow_copy_type"}
INDEXED = {"__getitem__"}
NOT_NUMBERS = {"__get__", "__set__", "__delete__", "as_subclass"}


class Foreign(Tensor):
    """Tensor of the pretended device."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute on the processor what all arguments are on the device for."""
        kwargs, name = dict(kwargs or {}), func.__name__
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and owner in ("device", "is_cuda", "is_cpu"):
            return {"device": DEVICE, "is_cuda": True, "is_cpu": False}[owner]
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        target = target_of(func, args, kwargs)
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return moved(func, args, kwargs, target if name == "to" else torch.device(name))
        if name not in NOT_NUMBERS | COPIES | INDEXED:
            check_all_there(name, (args, kwargs))
        on_processor = target is not None and target.type == "cpu"
        kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        found = super().__torch_function__(func, types, args, kwargs)
        if name == "__get__" and owner == "grad" and found is not None:
            return found.as_subclass(cls)  # torch returns a plain tensor
        if name == "copy_" and not isinstance(args[0], cls):
            return args[0]  # a copy to the processor
        return plain(found) if on_processor else found


class _Mode(TorchFunctionMode):
    """Makes tensors of the pretended device where one of the real device is requested."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("pin_memory", "record_stream") and isinstance(args[0], Tensor):
            return args[0]
        if any(isinstance(value, Foreign) for value in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        target = torch.device("cuda") if name == "cuda" else target_of(func, args, kwargs)
        if target is None or target.type != "cuda":
            return func(*args, **kwargs)
        if name in ("to", "cuda"):
            return moved(func, args, kwargs, target)
        kwargs.pop("device", None)
        return func(*args, **kwargs).as_subclass(Foreign)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def check_all_there(name: str, arguments: Any) -> None:
    """Raise RuntimeError where tensors of the device meet one of the processor that is no scalar."""
    strangers = [value for value in tensors_in(arguments) if not isinstance(value, Foreign) and value.dim()]
    if strangers:
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the cpu, of shape {tuple(strangers[0].shape)}")


def target_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that a call names, if it does."""
    named = kwargs.get("device")
    if named is None and getattr(func, "__name__", "") == "to":
        if isinstance(args[1], Foreign):
            return DEVICE
        named = args[1].device if isinstance(args[1], Tensor) else args[1]
    return torch.device(named) if isinstance(named, torch.device | str) else None


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.device | None) -> Tensor:
    """Return the tensor on its target, with the type that the call names."""
    value = args[0]
    types = [part for part in (*args[1:], *kwargs.values()) if isinstance(part, torch.dtype)]
    types += [part.dtype for part in args[1:] if isinstance(part, Tensor)]
    is_there = isinstance(value, Foreign) if target is None else target.type == "cuda"
    here = plain(value)
    converted = here.to(types[0]) if types else here
    if is_there == isinstance(value, Foreign):
        return value if converted is here else (converted.as_subclass(Foreign) if is_there else converted)
    copied = converted.clone()
    return copied.as_subclass(Foreign) if is_there else copied


def plain(value: Any) -> Any:
    """Return tensors of the device as those of the processor, with the same memory."""
    if isinstance(value, Foreign):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Pretend that there is a GPU while the block runs, in this thread. Modules that are moved get new parameters."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if args == (DEVICE,) and all(
            isinstance(value, Foreign) for value in module.state_dict(keep_vars=True).values()
        ):
            return module  # it keeps its parameters, which an optimizer may have
        if isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype
        return move(module, *args, **kwargs)

    try:
        with _Mode(), mock.patch.object(nn.Module, "to", to):
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
