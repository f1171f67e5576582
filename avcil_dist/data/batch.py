"""Batch of a rank: tensors, labels and the state of each row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.plan import NO_CLIPS


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch: `num_current` rows of the current step, then exemplars.

    `visual` (B, …) and `audio` (B, …) are frames and filterbanks, or features. `labels` (B,) are positions in the
    class order. `valid` (B,) is false for padding and for damaged clips; their rows are zero, and `faults` are the
    error lines of the damaged ones. `counts` are the reader's counters since the batch before (`reader.COUNTS`), and
    "stall_seconds", the time that the consumer waited for the batch. `clips` (B,) are numbers in the manifest.
    """

    visual: Tensor
    audio: Tensor
    labels: Tensor
    valid: Tensor
    num_current: int
    faults: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    clips: np.ndarray = field(default_factory=lambda: NO_CLIPS)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, each with a row per clip."""
        return self.visual, self.audio, self.labels, self.valid

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `function` to each tensor."""
        visual, audio, labels, valid = map(function, self.tensors)
        return replace(self, visual=visual, audio=audio, labels=labels, valid=valid)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; the copy is asynchronous from page-locked memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def wait(self, event: torch.cuda.Event) -> None:
        """Make the device's current stream wait for `event`, which follows the copy of this batch."""
        stream = torch.cuda.current_stream(self.labels.device)
        stream.wait_event(event)
        for tensor in self.tensors:
            tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, for copies that overlap with compute."""
        return self.map(Tensor.pin_memory)


@dataclass(frozen=True)
class PartialBatch:
    """A batch of which the rows in `is_read` (B,) were read: `visual` and `audio` hold only these rows.

    The other rows are in the clip cache, which completes the batch (`ClipCache.complete`).
    """

    batch: Batch
    is_read: np.ndarray

    def pin_memory(self) -> "PartialBatch":
        """Return the batch in page-locked memory."""
        return replace(self, batch=self.batch.pin_memory())
