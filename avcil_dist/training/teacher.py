"""The teacher: the network of the step before, frozen, outside the student's engine."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avcil_dist.data.loader import Batch
from avcil_dist.models.attention import TeacherView
from avcil_dist.models.network import AudioVisualNetwork


class Teacher(nn.Module):
    """Locked: `.train()` on it or on what holds it changes nothing, no parameter takes a gradient."""

    def __init__(self, network: AudioVisualNetwork, state: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.network.load_state_dict(dict(state))
        self.network.requires_grad_(False).eval().to(device)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return self

    def logits(self, batch: Batch) -> Tensor:
        """(B, old classes), as an ordinary tensor: inference tensors cannot be kept for backward."""
        with torch.inference_mode():
            logits = self.network(batch.visual, batch.audio).logits
        return logits.clone()

    def view(self, batch: Batch) -> TeacherView:
        """What the teacher attends to in the batch's exemplars."""
        return self.network.view(batch.visual, batch.audio, slice(batch.num_current, None))
