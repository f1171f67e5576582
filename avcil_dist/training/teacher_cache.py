"""Cache of teacher outputs: computed once per step, one entry per clip, reused in every epoch.

The teacher does not change within a step. Without random augmentation a clip gives the same input tensors in every
epoch, and so the same teacher output.
"""

import hashlib
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

DEVICE_SHARE = 0.1  # largest share of the device's free memory; a larger cache stays in host memory


@dataclass(frozen=True)
class TeacherCache:
    """Teacher outputs by clip: row i of `output` is that of `clips[i]`.

    `clips` (n,) are ascending; `valid` (n,) is false for clips that could not be read.
    """

    clips: np.ndarray
    valid: np.ndarray
    output: Output

    def lookup(self, clips: np.ndarray, device: torch.device) -> Output:
        """Return the outputs for these clips, on `device`. All of them must be in the cache."""
        rows = torch.from_numpy(self._rows(clips))
        return self.output.map(lambda values: _to(values[_to(rows, values.device)], device))

    def to(self, device: torch.device) -> "TeacherCache":
        """Return the cache on a GPU if it has room, otherwise unchanged."""
        if device.type != "cuda":
            return self
        size = sum(values.numel() * values.element_size() for values in self.output.tensors())
        if size > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, output=self.output.map(lambda values: values.to(device)))

    def mask_missing(self, batch: Batch, manifest: Manifest) -> Batch:
        """Mark clips without a teacher output as not valid, each with a fault that names it."""
        if self.valid.all():
            return batch
        missing = batch.valid.cpu().numpy() & ~self.valid[self._rows(batch.clips)]
        if not missing.any():
            return batch
        faults = [f"{manifest.key(clip)}: could not be read for the teacher cache" for clip in batch.clips[missing]]
        return replace(
            batch,
            valid=batch.valid & torch.from_numpy(~missing).to(batch.valid.device),
            faults=(*batch.faults, *faults),
        )

    def to_state(self, manifest: Manifest) -> dict[str, Any]:
        """Return tensors and plain values for a snapshot, with a digest of the clips' keys for their numbers."""
        present = {name: values for name, values in self.output._asdict().items() if values is not None}
        return {"clips": _digest(self.clips, manifest), "valid": torch.from_numpy(self.valid)} | present

    @classmethod
    def from_state(cls, state: Mapping[str, Any], clips: np.ndarray, manifest: Manifest) -> "TeacherCache | None":
        """Return the cache that `to_state` stored; None where it covers other clips than `clips` (ascending)."""
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        valid = tensors.pop("valid", None)
        if valid is None or valid.dtype != torch.bool or "logits" not in tensors:
            return None
        if any(tensor.shape[:1] != (len(clips),) for tensor in (valid, *tensors.values())):
            return None
        if state.get("clips") != _digest(clips, manifest):
            return None
        output: dict[str, Any] = {name: tensors.get(name) for name in Output._fields}
        return cls(clips, valid.numpy(), Output(**output))

    def _rows(self, clips: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.clips, clips)


def build_teacher_cache(
    teacher_output: Callable[[Batch], Output],
    inference: InferencePass,
    clips: np.ndarray,
    *,
    after_batch: Callable[[], None],
) -> TeacherCache:
    """Compute the teacher's output for each of `clips` (ascending), by all ranks in one pass. Equal on all ranks.

    `after_batch` is called after each batch. Raises DataError as `InferencePass.batches` does.
    """
    outputs: list[Output] = []
    valid: list[Tensor] = []
    for batch in inference.batches(clips):
        outputs.append(teacher_output(batch).map(lambda rows: gather_rows(rows, len(rows)).cpu()))
        valid.append(gather_rows(batch.valid, len(batch.valid)).cpu())
        after_batch()
    output = Output.cat(outputs).map(lambda rows: rows[: len(clips)])  # the last batch is padded
    return TeacherCache(clips, torch.cat(valid)[: len(clips)].numpy(), output)


def _digest(clips: np.ndarray, manifest: Manifest) -> str:
    """Return the sha256 of the classes and keys of the clips, one line each."""
    digest = hashlib.sha256()
    for clip in clips.tolist():
        digest.update(f"{manifest.class_of(clip)}/{manifest.key(clip)}\n".encode())
    return digest.hexdigest()


def _to(values: Tensor, device: torch.device) -> Tensor:
    """Return the values on the device, without waiting for its queued work."""
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
