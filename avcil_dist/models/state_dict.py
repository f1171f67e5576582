"""State dicts: compared with the module that they are for, and loaded into it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avcil_dist.errors import ArtifactError


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


def load_whole_state(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a complete state dict, frozen parts and buffers included, into a network.

    Raises ArtifactError, naming `source` and some of the names, for weights that do not fit.
    """
    problems = mismatches(network, weights, exact_types=True)
    if problems:
        raise ArtifactError(
            f"{source}: its weights are not those of the network: {problems}; use the configuration and the "
            "version of the program that made it, or begin anew with --restart"
        )
    network.load_state_dict(dict(weights))


def is_finite(values: Tensor) -> bool:
    """Whether every number is finite."""
    return not (values.is_floating_point() or values.is_complex()) or bool(torch.isfinite(values).all())


def _fits(values: Tensor, expected: Tensor, exact_types: bool) -> bool:
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        return False
    if exact_types:
        return values.dtype == expected.dtype
    return values.is_floating_point() if expected.is_floating_point() else values.dtype == expected.dtype
