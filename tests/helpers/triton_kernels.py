"""Attention with Triton's kernels against plain torch; prints the types that agree.

With TRITON_INTERPRET=1, Triton's interpreter runs them on the CPU.
"""

from unittest import mock

import torch
from torch import Tensor

from avcil_dist.models.attention import module
from avcil_dist.models.attention.kernels_torch import AttentionKernels, TorchKernels
from avcil_dist.models.attention.kernels_triton import TritonKernels
from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView

CLIPS, FRAMES, POSITIONS, DIM = 3, 2, 45, 70  # no multiples of a program's tile


def run(
    kernels: AttentionKernels, dtype: torch.dtype, student: AudioGuidedAttention, batch: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Results and gradients; the last clip has a teacher."""
    audio, visual = batch[0].clone().requires_grad_(), batch[1]
    torch.manual_seed(1)
    view = TeacherView(AudioGuidedAttention(DIM).to(audio.device), audio[2:].detach(), visual[2:])
    with (
        mock.patch.object(module, "_choose_kernels", return_value=kernels),
        torch.autocast(audio.device.type, dtype, enabled=dtype != torch.float32),
    ):
        pooled, divergence = student(audio, visual, view)
    results = [pooled, divergence.spatial, divergence.temporal]
    factors = torch.randn(CLIPS, DIM).to(pooled.device)
    total = (pooled * factors).sum() + divergence.spatial.sum() + 2 * divergence.temporal.sum()
    return [*results, *torch.autograd.grad(total, [audio, *student.parameters()])]


def main(device: str = "cpu") -> None:
    """Compare in each type."""
    torch.manual_seed(0)
    student = AudioGuidedAttention(DIM).to(device)
    batch = torch.randn(CLIPS, DIM).to(device), torch.randn(CLIPS, FRAMES, POSITIONS, DIM).half().to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        pairs = zip(
            run(TritonKernels(), dtype, student, batch), run(TorchKernels(), dtype, student, batch), strict=True
        )
        for ours, theirs in pairs:
            assert (ours - theirs).norm() <= tolerance * max(1, theirs.norm()), (dtype, ours, theirs)
        print(dtype)


if __name__ == "__main__":
    main()
