"""Compute precision of networks, the same for student, teacher and evaluation.

Weights, gradients and outputs are always float32. Half precision is used between them, by torch's autocast, which
keeps the operations that need float32 in float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from avcil_dist.config.schema import Precision

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Context in which torch computes in `precision`; for float32 it changes nothing."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
