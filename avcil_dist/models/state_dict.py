"""Comparison of a state dict with the module that it is for."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def mismatches(module: nn.Module, state: Mapping[str, Tensor], *, exact_types: bool) -> str:
    """Describe parameters and buffers that do not fit: names, shapes, types, and numbers that are not finite.

    With `exact_types` a tensor has the type of the module's, otherwise any real type for a real one: weights of others
    may be float16. Gives a count and up to three names of each kind. Empty if `state` fits.
    """
    expected = module.state_dict()
    known = [name for name in expected if name in state]
    typed = {name for name in known if _fits(state[name], expected[name], exact_types)}
    kinds = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [name for name in known if state[name].shape != expected[name].shape],
        "of another type": [name for name in known if name not in typed],
        "not finite": [name for name in known if name in typed and not is_finite(state[name])],
    }
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names)


def is_finite(values: Tensor) -> bool:
    """Whether every number is finite."""
    return not (values.is_floating_point() or values.is_complex()) or bool(torch.isfinite(values).all())


def _fits(values: Tensor, expected: Tensor, exact_types: bool) -> bool:
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        return False
    if exact_types:
        return values.dtype == expected.dtype
    return values.is_floating_point() if expected.is_floating_point() else values.dtype == expected.dtype
