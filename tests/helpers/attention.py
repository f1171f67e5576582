"""The attention as the paper defines it, with its maps written out; tests compare the kernels with it."""

from torch import Tensor

from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView


def kl(theirs: Tensor, ours: Tensor) -> Tensor:
    return (theirs * (theirs / ours).log()).flatten(1).sum(1)


def defined(
    student: AudioGuidedAttention, audio: Tensor, visual: Tensor, view: TeacherView | None
) -> tuple[Tensor, ...]:
    """Pooled and divergences as the paper defines them."""
    spatial, temporal = student.maps(audio, visual)
    pooled = (temporal.unsqueeze(2) * spatial * visual).sum(dim=(1, 2))
    if view is None:
        return (pooled,)
    theirs = [maps.detach() for maps in view.attention.maps(view.audio, view.visual)]
    compared = slice(len(audio) - len(view.audio), None)
    return pooled, kl(theirs[0], spatial[compared]), kl(theirs[1], temporal[compared])
