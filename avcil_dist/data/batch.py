"""Batch of a rank: tensors, labels and the state of each row."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.plan import NO_CLIPS


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch: `num_current` rows of the current step, then exemplars.

    `visual` (B, …) and `audio` (B, …) are pictures and filterbanks, or features; `labels` (B,)
    are positions in the class order; `valid` (B,) is false for padding and damaged clips, whose
    rows are zero; `faults` say what was damaged; `counts` what reading took since the batch before, by
    the names of `reader.COUNTS`, and "stall_seconds", the time that its taker waited for it; `clips` (B,)
    are numbers in the manifest.
    """

    visual: Tensor
    audio: Tensor
    labels: Tensor
    valid: Tensor
    num_current: int
    faults: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    clips: np.ndarray = field(default_factory=lambda: NO_CLIPS)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("visual", "audio", "labels", "valid")
        }
        return replace(self, **moved)

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the device go on with this batch once the event, on the stream that brought it, has happened."""
        stream = torch.cuda.current_stream(self.labels.device)
        stream.wait_event(event)
        for tensor in (self.visual, self.audio, self.labels, self.valid):
            tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies that overlap with compute."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("visual", "audio", "labels", "valid")}
        return replace(self, **pinned)
