"""Reference for measurements: one AV-CIL iteration in plain torch, written as in the paper.

Everything is in float32, every attention map is materialised, the teacher runs on all clips, and nothing is
checkpointed, fused or shared. No other part of the system uses it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T_KD = 2.0


class EagerOutput(NamedTuple):
    """Outputs of a network for a batch; `spatial` (B, T, S, D) and `temporal` (B, T, D) are the attention maps."""

    logits: Tensor
    audio: Tensor
    visual: Tensor
    spatial: Tensor
    temporal: Tensor


class EagerNetwork(nn.Module):
    """Audio-guided attention over (B, T, S, D) tokens, two projections, a linear classifier."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.attn_audio = nn.Linear(dim, dim)
        self.attn_visual = nn.Linear(dim, dim)
        self.audio_proj = nn.Linear(dim, dim)
        self.visual_proj = nn.Linear(dim, dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, visual: Tensor, audio: Tensor) -> EagerOutput:
        """Classify tokens (B, T, S, D) and audio (B, D)."""
        p_a = torch.tanh(self.attn_audio(audio))
        p_v = torch.tanh(self.attn_visual(visual))
        spatial = torch.softmax(p_v * p_a[:, None, None], dim=2)
        temporal = torch.softmax((spatial * p_v).sum(dim=2) * p_a[:, None], dim=1)
        pooled = (temporal * (spatial * visual).sum(dim=2)).sum(dim=1)
        f_a, f_v = torch.relu(self.audio_proj(audio)), torch.relu(self.visual_proj(pooled))
        return EagerOutput(self.classifier(f_a + f_v), f_a, f_v, spatial, temporal)


def avcil_loss(
    student: EagerOutput,
    teacher: EagerOutput,
    labels: Tensor,
    *,
    num_current: int,
    tasks: Sequence[slice],
    lambda_instance: float = 0.1,
    lambda_class: float = 1.0,
    lambda_attention: float = 0.5,
    temperature: float = 0.05,
) -> Tensor:
    """Return the loss of the method as released; `tasks` are the slices of the head of the old tasks."""
    batch, num_old = len(labels), tasks[-1].stop
    current = F.cross_entropy(student.logits[:num_current, num_old:], labels[:num_current] - num_old)
    replayed = F.cross_entropy(student.logits[num_current:, :num_old], labels[num_current:])
    loss = (num_current * current + (batch - num_current) * replayed) / batch
    for task in tasks:
        ours = F.log_softmax(student.logits[:, task] / T_KD, dim=1)
        theirs = F.softmax(teacher.logits[:, task] / T_KD, dim=1)
        loss = loss + T_KD**2 * F.kl_div(ours, theirs, reduction="batchmean")
    matches = F.log_softmax(F.normalize(student.audio) @ F.normalize(student.visual).T / temperature, dim=1)
    loss = loss - lambda_instance * matches.diagonal().mean()
    positives = (labels[:, None] == labels[None, :]).float()
    loss = loss - lambda_class * (positives * matches).sum(dim=1).mean() / batch
    spatial = F.kl_div(student.spatial[num_current:].log(), teacher.spatial[num_current:], reduction="batchmean")
    temporal = F.kl_div(student.temporal[num_current:].log(), teacher.temporal[num_current:], reduction="batchmean")
    return loss + lambda_attention * spatial + (1 - lambda_attention) * temporal
