"""The dtype that networks compute in, which student, teacher and every evaluation share.

Weights, gradients and what a network gives are float32 whatever the precision: half precision is for what lies between,
by torch's autocast, which knows the operations that must not be in it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from avcil_dist.config.schema import Precision

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A block that computes in `precision`; float32 leaves all as it is."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
