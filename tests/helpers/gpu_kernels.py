"""The fused attention of a GPU against float64, in each half; prints the types that agree.

With TRITON_INTERPRET=1, Triton's interpreter runs the kernels on the CPU. New memory contains NaN, so a value that no
kernel writes is found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from avcil_dist.models.attention import fused_gpu
from avcil_dist.models.attention.fused import AttentionInputs
from avcil_dist.models.attention.fused_gpu import FusedAttend, FusedPass
from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView
from tests.helpers.attention import defined

FRAMES, POSITIONS, DIM = 3, 75, 64  # no multiples of a program's tile


@contextmanager
def poisoned() -> Iterator[None]:
    """Context in which new memory contains NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with (
        mock.patch.object(torch, "empty", lambda *size, **kind: fill(empty(*size, **kind))),
        mock.patch.object(torch, "empty_like", lambda tensor, **kind: fill(empty_like(tensor, **kind))),
    ):
        yield


def fused(student: AudioGuidedAttention, audio: Tensor, visual: Tensor, view: TeacherView | None) -> tuple[Tensor, ...]:
    """The same by the kernels, whatever the device."""
    teacher = None
    if view is not None:
        linear = view.attention.attn_visual
        teacher = AttentionInputs(
            view.attention._guide(view.audio), view.visual, linear.weight.detach(), linear.bias.detach()
        )
    linear = student.attn_visual
    pooled, *divergence = FusedAttend.apply(student._guide(audio), visual, linear.weight, linear.bias, teacher)
    return pooled, *(divergence if view is not None else ())


def differentiated(function, student, audio, visual, view) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Results, and gradients of a sum in which every result has a weight of its own."""
    audio = audio.clone().requires_grad_()
    results = function(student, audio, visual, view)
    generator = torch.Generator().manual_seed(1)
    total = sum((r * torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r)).sum() for r in results)
    return [*(result.detach() for result in results), *torch.autograd.grad(total, [audio, *student.parameters()])]


def errors(dtype: torch.dtype, device: str, shape: tuple[int, int, int, int, int], weights: float = 1.0) -> list[float]:
    """Relative errors of results and gradients for `shape`: clips without a teacher and with, frames, positions, D."""
    plain, compared, frames, positions, dim = shape
    student, other = AudioGuidedAttention(dim).to(device), AudioGuidedAttention(dim).to(device)
    with torch.no_grad():
        student.attn_visual.weight.mul_(weights)
    clips = plain + compared
    audio = torch.randn(clips, dim, device=device)
    visual = torch.randn(clips, frames, positions, dim, device=device).to(dtype)
    view = TeacherView(other, audio[plain:], visual[plain:]) if compared else None
    with poisoned():
        ours = differentiated(fused, student, audio, visual, view)
    again = differentiated(fused, student, audio, visual, view)
    assert all(map(torch.equal, ours, again)), "a repeated call gave other bits"
    inferred = FusedPass(
        AttentionInputs(student._guide(audio), visual, *student.attn_visual.parameters()), None, needs_grad=False
    )
    with torch.no_grad():
        inferred.run()
    assert torch.equal(inferred.pooled, ours[0])
    exact = TeacherView(other.double(), audio[plain:].double(), visual[plain:].double()) if compared else None
    true = differentiated(defined, student.double(), audio.double(), visual.double(), exact)
    assert all(mine.dtype == torch.float32 for mine in ours)
    return [((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in zip(ours, true, strict=True)]


def main(device: str = "cpu") -> None:
    """Compare in each type."""
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 0.03)):
        uneven = [(plain, compared, FRAMES, POSITIONS, DIM) for plain, compared in ((3, 2), (0, 2), (3, 0))]
        for shape in (*uneven, (1, 1, 2, 8, 128)):
            found = errors(dtype, device, shape)
            assert max(found) <= tolerance, (dtype, shape, found)
        print(dtype)


if __name__ == "__main__":
    with mock.patch.object(fused_gpu, "FAST_TANH", False):
        main()
