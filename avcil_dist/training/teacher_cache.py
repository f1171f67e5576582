"""What a step's teacher says to each of the step's clips: asked once, looked up in every epoch.

The teacher stays as it is within a step. Where a clip becomes the same tensors each time, which it does unless
clips are varied at random, so does what the teacher says to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.batch import Batch
from avcil_dist.data.manifest import Manifest
from avcil_dist.models.outputs import Output
from avcil_dist.training.collectives import gather_rows
from avcil_dist.training.inference_pass import InferencePass

DEVICE_SHARE = 0.1  # of the device's free memory they may take; else they stay in host memory
PARTS = ("logits", "audio", "visual", "pooled", "importance")


@dataclass(frozen=True)
class TeacherCache:
    """By clip: `clips` (n,) ascending, `valid` (n,) false where one could not be read, and the rows of `output`."""

    clips: np.ndarray
    valid: np.ndarray
    output: Output

    def lookup(self, clips: np.ndarray, device: torch.device) -> Output:
        """What the teacher said to these clips, on the device."""
        rows = torch.from_numpy(self._rows(clips))
        return self.output.map(lambda values: _to(values[_to(rows, values.device)], device))

    def to(self, device: torch.device) -> "TeacherCache":
        """The same on a device, if that has room for them."""
        if device.type != "cuda":
            return self
        size = sum(values.numel() * values.element_size() for values in self.output.tensors())
        if size > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, output=self.output.map(lambda values: values.to(device)))

    def mask_missing(self, batch: Batch, manifest: Manifest) -> Batch:
        """The batch without the clips that could not be read when the teacher was asked."""
        if self.valid.all():
            return batch
        lost = batch.valid.cpu().numpy() & ~self.valid[self._rows(batch.clips)]
        if not lost.any():
            return batch
        faults = [f"{manifest.key(clip)}: could not be read when the teacher was asked" for clip in batch.clips[lost]]
        return replace(
            batch, valid=batch.valid & torch.from_numpy(~lost).to(batch.valid.device), faults=(*batch.faults, *faults)
        )

    def to_state(self, manifest: Manifest) -> dict[str, Any]:
        """As tensors and plain values, by the clips' keys."""
        parts = {name: getattr(self.output, name) for name in PARTS}
        keys = _keys(self.clips, manifest)
        return {"keys": keys, "valid": torch.from_numpy(self.valid)} | {
            name: values for name, values in parts.items() if values is not None
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], clips: np.ndarray, manifest: Manifest) -> "TeacherCache | None":
        """The inverse; None where the state is not about these clips (ascending)."""
        if state["keys"] != _keys(clips, manifest):
            return None
        return cls(clips, state["valid"].numpy(), _output(state))

    def _rows(self, clips: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.clips, clips)


def build_teacher_cache(
    said: Callable[[Batch], Output], features: InferencePass, clips: np.ndarray, *, between: Callable[[], None]
) -> TeacherCache:
    """What a teacher says to each of the clips (ascending), in one pass by all ranks; the same on each of them.

    `between` is called between two batches. Raises DataError as `InferencePass.batches` does.
    """
    outputs: list[Output] = []
    valid: list[Tensor] = []
    for batch in features.batches(clips):
        outputs.append(said(batch).map(lambda rows: gather_rows(rows, len(rows)).cpu()))
        valid.append(gather_rows(batch.valid, len(batch.valid)).cpu())
        between()
    parts = {
        name: torch.cat([getattr(output, name) for output in outputs])[: len(clips)]
        for name in PARTS
        if getattr(outputs[0], name) is not None
    }
    return TeacherCache(clips, torch.cat(valid)[: len(clips)].numpy(), _output(parts))


def _output(parts: Mapping[str, Tensor]) -> Output:
    return Output(**{name: parts.get(name) for name in PARTS})  # type: ignore[arg-type]


def _keys(clips: np.ndarray, manifest: Manifest) -> list[str]:
    return [f"{manifest.class_of(int(clip))}/{manifest.key(int(clip))}" for clip in clips]


def _to(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it computes."""
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
