"""Memory of a method in bytes: everything that a step hands to the next one, so that methods compare at equal bytes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.data.shard import MEMBERS
from avcil_dist.streams.exemplar_logits import ExemplarLogits
from avcil_dist.streams.metrics import MemoryUse
from avcil_dist.training.exemplars import exemplar_clips
from avcil_dist.training.incremental_step import Step


def memory_use(
    step: Step, memory: ExemplarMemory, model: Mapping[str, Tensor], logits: ExemplarLogits | None = None
) -> MemoryUse:
    """Return the memory after `step`: the clips that it keeps, as they are stored; its model; its method's state.

    `logits` stored with exemplars count as state. A method that trains on all data keeps every training clip of
    the seen classes. The same on all ranks.
    """
    manifest = step.manifest
    kept = exemplar_clips(manifest, memory)
    if step.needs.all_data:
        kept = np.union1d(kept, manifest.clips(step.seen_classes, "train"))
    members = [member for member in MEMBERS[manifest.kind] if member != "json"]
    return MemoryUse(
        num_clips=len(kept),
        clip_bytes=int(sum(manifest.spans(member, kept)[1].sum() for member in members)),
        model_bytes=_tensor_bytes(model),
        state_bytes=_tensor_bytes(step.method.state_dict()) + (logits.nbytes if logits else 0),
    )


def _tensor_bytes(state: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
