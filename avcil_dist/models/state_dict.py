"""Comparison of a state dict with the module that it is for."""

from collections.abc import Mapping

from torch import Tensor, nn


def mismatches(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Describe parameters and buffers that are missing in `state`, unknown to `module`, or of another shape.

    Gives a count and up to three names of each kind. Empty if `state` fits.
    """
    expected = module.state_dict()
    kinds = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [name for name in expected if name in state and state[name].shape != expected[name].shape],
    }
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names)
