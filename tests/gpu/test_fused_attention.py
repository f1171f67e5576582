"""The fused attention on a GPU: against float64 at the sizes of real features, and the inputs it supports."""

import pytest
import torch

from avcil_dist.models.attention import module
from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView
from tests.helpers import gpu_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_kernels_give_what_float64_gives_and_the_same_bits_twice() -> None:
    gpu_kernels.main("cuda")


@pytest.mark.parametrize(("weights", "loss"), [(0.01, 8), (1.0, 1), (30.0, 30)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 0.03)])
def test_real_sizes_give_what_float64_gives(dtype: torch.dtype, tolerance: float, weights: float, loss: int) -> None:
    """Small weights make keys that hardly differ between positions, so that their gradient's sum nearly cancels."""
    torch.manual_seed(0)
    found = gpu_kernels.errors(dtype, "cuda", (5, 3, 8, 196, 768), weights)
    assert max(found) <= tolerance * loss, found


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_the_module_uses_it_under_autocast_and_is_close_to_plain_torch_in_float32(autocast: torch.dtype) -> None:
    torch.manual_seed(0)
    student, other = (AudioGuidedAttention(256).cuda() for _ in range(2))
    audio, visual = torch.randn(6, 256, device="cuda"), torch.randn(6, 4, 100, 256, device="cuda").half()
    view = TeacherView(other, audio[4:], visual[4:])
    assert module._is_fused("auto", visual, other._teacher_inputs(view), autocast)

    def run() -> list[torch.Tensor]:
        pooled, divergence = student(audio, visual, view)
        total = pooled.square().sum() + divergence.spatial.sum() + divergence.temporal.sum()
        return [
            pooled.detach(),
            *(part.detach() for part in divergence),
            *torch.autograd.grad(total, student.parameters()),
        ]

    with torch.autocast("cuda", autocast):
        ours = run()
    student.choice = other.choice = "torch"
    for mine, true in zip(ours, run(), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() <= 0.02 * true.norm()


def test_nothing_outlives_a_backward() -> None:
    student = AudioGuidedAttention(256).cuda()
    audio, visual = torch.randn(8, 256, device="cuda"), torch.randn(8, 4, 100, 256, device="cuda").half()

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            student(audio, visual)[0].sum().backward()

    run()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run()
    assert torch.cuda.memory_allocated() == before
    with torch.autocast("cuda", torch.bfloat16):
        student(audio, visual)
    assert torch.cuda.memory_allocated() == before
