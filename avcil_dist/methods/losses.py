"""Losses as pure functions of tensors. Every mean is over the rows passed, those of the global batch.

A batch is current clips followed by exemplars; labels are positions in the head. A term without rows or classes
is 0 with a graph, so that a sum of terms can always be backpropagated.
Source: Pian et al. 2023; Ahn et al. 2021 for the separated softmax; the methods' files name others.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.models.outputs import Divergence

ROUNDING = 1e-6  # rounding error of the difference of two float32 unit vectors


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over all classes of the head; `logits` (B, C), `labels` (B,)."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


def separated_softmax(logits: Tensor, labels: Tensor, num_current: int, num_old: int) -> Tensor:
    """Cross-entropy over new classes only for current clips, and over old classes only for exemplars.

    The first `num_current` rows of `logits` (B, C) are current clips; the first `num_old`
    columns are old classes. Mean over all B rows.
    """
    parts = []
    if num_current > 0:
        new = F.cross_entropy(logits[:num_current, num_old:], labels[:num_current] - num_old, reduction="sum")
        parts.append(new)
    if num_current < len(labels):
        parts.append(F.cross_entropy(logits[num_current:, :num_old], labels[num_current:], reduction="sum"))
    return sum(parts, start=_zero(logits)) / max(1, len(labels))


def balanced_softmax(logits: Tensor, labels: Tensor, log_counts: Tensor) -> Tensor:
    """Cross-entropy of logits + log π, mean over rows (Ren et al. 2020).

    `logits` (B, C), `labels` (B,). `log_counts` (C,) is log π, with π the expected number of clips of each class in a
    batch; -inf for a class without clips.
    """
    return cross_entropy(logits + log_counts, labels)


def task_distillation(logits: Tensor, teacher_logits: Tensor, slices: Sequence[slice], temperature: float) -> Tensor:
    """Task-wise distillation: sum over old tasks of T²·KL(teacher ‖ student), each within its own classes.

    `slices` are the old tasks' parts of the head; `logits` (B, C), `teacher_logits` (B, at least all old classes).
    """
    loss = _zero(logits)
    for task in slices:
        student = F.log_softmax(logits[:, task] / temperature, dim=1)
        teacher = F.log_softmax(teacher_logits[:, task].detach() / temperature, dim=1)
        loss = loss + F.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * loss / max(1, len(logits))


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of logits (B, C_o) with the teacher's probabilities, both at a temperature; mean over rows."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.softmax(teacher_logits.detach() / temperature, dim=1)
    return -(teacher * student).sum() / max(1, len(logits))


def logit_distance(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared distance of logits (B, C_o) to the teacher's, mean over rows and classes."""
    return F.mse_loss(logits, teacher_logits.detach(), reduction="sum") / max(1, logits.numel())


def stored_distance(logits: Tensor, stored: Tensor, is_known: Tensor) -> Tensor:
    """Squared distance of logits (B, C) to the stored ones (B, C_o), mean over those that are known."""
    squares = (logits[:, : stored.shape[1]] - stored).square()
    return torch.where(is_known, squares, 0.0).sum() / is_known.sum().clamp(min=1)


def sigmoid_distillation(logits: Tensor, teacher_logits: Tensor, variant: Literal["released", "paper"]) -> Tensor:
    """Binary cross-entropy of old logits (B, C_o) with the teacher's probabilities, mean over rows and classes.

    `released`: the authors' program passes probabilities to a loss that applies the sigmoid itself.
    """
    inputs = torch.sigmoid(logits) if variant == "released" else logits
    targets = torch.sigmoid(teacher_logits.detach())
    return F.binary_cross_entropy_with_logits(inputs, targets, reduction="sum") / max(1, logits.numel())


def proxy_nca(logits: Tensor, labels: Tensor) -> Tensor:
    """NCA loss of each clip (B,) from similarities to classes (B, C), as in the authors' program.

    Its margin is subtracted from every logit, so it cancels out. In the sum over the other classes, the clip's own
    class counts with the largest logit of the row. So the maximum is part of the function, not a shift that
    cancels, and has a gradient.
    """
    shifted = logits - logits.amax(dim=1, keepdim=True)
    own = F.one_hot(labels, logits.shape[1]).bool()
    others = shifted.masked_fill(own, 0).exp().sum(dim=1).log()
    return others - shifted[own]


def feature_discrepancy(features: Sequence[Tensor], teacher_features: Sequence[Tensor], importance: Tensor) -> Tensor:
    """Σ_m mean_i( I_m,i · ‖norm(h_m) − norm(h'_m)‖ ) (Kang et al. 2022).

    `features` are M of (B, D_m); `importance` (B, M) is normalised over m here.
    """
    shares = importance / importance.sum(dim=1, keepdim=True).clamp_min(torch.finfo(importance.dtype).tiny)
    loss = torch.sum(features[0][:0])
    for ours, theirs, share in zip(features, teacher_features, shares.unbind(dim=1), strict=True):
        distance = _length(F.normalize(ours, dim=1) - F.normalize(theirs.detach(), dim=1))
        loss = loss + (share.detach() * distance).sum() / max(1, len(share))
    return loss


def instance_contrast(audio: Tensor, visual: Tensor, temperature: float) -> Tensor:
    """L_I, eq. 6: each clip's sound is contrasted with all pictures of the batch; its own are the target.

    `audio` and `visual` (B, D) need not have unit norm. Direction audio → visual.
    """
    return -_log_matches(audio, visual, temperature).diagonal().sum() / max(1, len(audio))


def class_contrast(
    audio: Tensor, visual: Tensor, labels: Tensor, temperature: float, variant: Literal["released", "paper"]
) -> Tensor:
    """L_C, eq. 7: each clip's sound is contrasted with all pictures of the batch; those of its class are targets.

    The sum over a clip's targets is divided by the batch size (`released`, as in the authors' program) or by
    their number (`paper`).
    """
    batch = max(1, len(audio))
    targets = (labels[:, None] == labels[None, :]).to(audio.dtype)
    divisor = batch if variant == "released" else targets.sum(dim=1)
    per_clip = (targets * _log_matches(audio, visual, temperature)).sum(dim=1) / divisor
    return -per_clip.sum() / batch


def attention_distillation(divergence: Divergence, lambda_attention: float) -> Tensor:
    """λ L_S + (1 − λ) L_T, eq. 9-11: means over the exemplars that the divergence covers."""
    spatial, temporal = divergence.spatial.sum(), divergence.temporal.sum()
    return (lambda_attention * spatial + (1 - lambda_attention) * temporal) / max(1, len(divergence.spatial))


def _log_matches(audio: Tensor, visual: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, B) that row i's sound belongs to row j's pictures."""
    scores = F.normalize(audio, dim=1) @ F.normalize(visual, dim=1).T
    return F.log_softmax(scores / temperature, dim=1)


def _zero(logits: Tensor) -> Tensor:
    """Zero with a graph: the sum of no rows, so it is 0 also for rows with infinite values."""
    return torch.sum(logits[:0])


def _length(rows: Tensor) -> Tensor:
    """Lengths (B,) of differences of unit vectors, with gradient 0 instead of NaN at length 0.

    Lengths below `ROUNDING` count as 0: the direction of such a difference is noise, but its gradient would have
    length 1.
    """
    squares = rows.square().sum(dim=1)
    is_there = squares > ROUNDING**2
    return torch.where(is_there, squares, 1).sqrt() * is_there
