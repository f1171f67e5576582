"""Audio-guided attention over visual tokens, and how far a student's is from its teacher's.

Source: Pian et al. 2023, section 3.3, eq. 2-5 and 9-10. Attention is per channel: each of the D
channels has a softmax over positions of its own, and one over frames.

A map is as large as the visual tokens, and several are needed at a time; so a batch is worked
through in chunks of clips, and a chunk's maps are made anew in the backward pass instead of kept.
Every score is a product of two tanh values, hence within [-1, 1]: its exponential cannot overflow,
and no softmax here looks for a maximum first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avcil_dist.models.outputs import Divergence

CHUNK_BYTES = 64 * 2**20  # of one map of a chunk; about eight such maps live at a time


@dataclass(frozen=True)
class TeacherView:
    """What a teacher saw of a batch's last E rows: its attention module and its own tokens.

    `audio` (E, D) and `visual` (E, T, S, D) are outputs of the teacher's encoders.
    """

    attention: "AudioGuidedAttention"
    audio: Tensor
    visual: Tensor


@dataclass(frozen=True)
class _Softmax:
    """A softmax over `dim` in pieces, so that no normalised map is ever written."""

    scores: Tensor
    exponentials: Tensor
    total: Tensor
    dim: int

    @classmethod
    def of(cls, scores: Tensor, dim: int) -> "_Softmax":
        exponentials = scores.exp()
        return cls(scores, exponentials, _long_sum(exponentials, dim), dim)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over `dim`, weighted by this softmax."""
        return _long_sum(self.exponentials * values, self.dim) / self.total

    def divergence_to(self, other: "_Softmax") -> Tensor:
        """(B,): KL(self ‖ other) over `dim`, summed over all else of a clip."""
        kl = self.mean(self.scores - other.scores) + other.total.log() - self.total.log()
        return kl.flatten(1).sum(1)


class AudioGuidedAttention(nn.Module):
    """Pools visual tokens into one vector, guided by the sound."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn_audio = nn.Linear(dim, dim)
        self.attn_visual = nn.Linear(dim, dim)

    def forward(
        self, audio: Tensor, visual: Tensor, teacher: TeacherView | None = None
    ) -> tuple[Tensor, Divergence | None]:
        """Pool tokens, and compare with a teacher where one is given.

        `audio` (B, D), `visual` (B, T, S, D). Returns pooled (B, D) and, for the last E rows that
        `teacher` covers, the divergence, each part (E,); no gradient reaches the teacher.
        """
        chunk = max(1, CHUNK_BYTES // (math.prod(visual.shape[1:]) * visual.element_size()))
        num_compared = 0 if teacher is None else len(teacher.audio)
        plain = _chunk_sizes(len(audio) - num_compared, chunk)
        compared = _chunk_sizes(num_compared, chunk)
        views: list[TeacherView | None] = [None] * len(plain)
        if teacher is not None:
            pairs = zip(teacher.audio.split(compared), teacher.visual.split(compared), strict=True)
            views += [TeacherView(teacher.attention, *pair) for pair in pairs]
        # split, not slices: the backward of a slice would write a gradient of the whole batch for every chunk.
        chunks = zip(audio.split(plain + compared), visual.split(plain + compared), views, strict=True)
        # Nothing here is random, so there is no state of a generator to keep for the second run.
        results = [checkpoint(self._attend, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks]
        pooled = torch.cat([result[0] for result in results])
        if teacher is None:
            return pooled, None
        empty = pooled.new_zeros(0)
        spatial = torch.cat([empty, *(result[1] for result in results[len(plain) :])])
        temporal = torch.cat([empty, *(result[2] for result in results[len(plain) :])])
        return pooled, Divergence(spatial, temporal)

    def maps(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention itself, to look at: spatial (B, T, S, D) sums to 1 over S, temporal (B, T, D) over T."""
        spatial, temporal = self._softmaxes(audio, visual)
        return spatial.exponentials / spatial.total.unsqueeze(2), temporal.exponentials / temporal.total.unsqueeze(1)

    def _attend(self, audio: Tensor, visual: Tensor, teacher: TeacherView | None) -> tuple[Tensor, ...]:
        """One chunk of C clips: pooled (C, D) and, with a teacher, the divergences (C,), spatial and temporal."""
        spatial, temporal = self._softmaxes(audio, visual)
        pooled = temporal.mean(spatial.mean(visual)).to(visual.dtype)
        if teacher is None:
            return (pooled,)
        with torch.no_grad():
            teacher_spatial, teacher_temporal = teacher.attention._softmaxes(teacher.audio, teacher.visual)
        return pooled, teacher_spatial.divergence_to(spatial), teacher_temporal.divergence_to(temporal)

    def _softmaxes(self, audio: Tensor, visual: Tensor) -> tuple[_Softmax, _Softmax]:
        """Over the positions of each frame, and over the frames."""
        guide = torch.tanh(self.attn_audio(audio)).unsqueeze(1)
        keys = torch.tanh(self.attn_visual(visual))
        spatial = _Softmax.of(keys * guide.unsqueeze(1), dim=2)
        temporal = _Softmax.of(spatial.mean(keys) * guide, dim=1)
        return spatial, temporal


def _long_sum(values: Tensor, dim: int) -> Tensor:
    """Sum in float32 at least: half precision loses count over many positions."""
    return values.sum(dim, dtype=torch.promote_types(values.dtype, torch.float32))


def _chunk_sizes(count: int, chunk: int) -> list[int]:
    return [min(chunk, count - start) for start in range(0, count, chunk)]
