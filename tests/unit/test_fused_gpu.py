"""The fused attention of a GPU: run by Triton's interpreter, and compiled for a GPU of another machine."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from avcil_dist.models.attention import fused_gpu, kernels_gpu, module
from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView

KERNELS = ["halve_weights", "sum_frames", "pool_frames", "compare_frames", "find_factors", "differentiate"]


@pytest.mark.slow
def test_kernels_give_what_float64_gives_and_the_same_bits_twice() -> None:
    """In a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.helpers.gpu_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.float16", "torch.bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("half", ["*bf16", "*fp16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_compiled_without_a_gpu(kernel: str, half: str) -> None:
    function = getattr(kernels_gpu, kernel)
    tile = fused_gpu.SUM_TILE
    chosen = {"STORE": True, "MOMENTS": True, "PEAKS": True, "FAST_TANH": True, "EVEN": True}
    chosen |= {"ROWS": tile.rows, "LANES": tile.lanes, "STAGES": tile.stages}
    types = dict.fromkeys(("halved", "keys", "values", "tokens", "teacher_keys", "out"), half)
    whole = ("frames", "positions", "dim", "first_clip", "first_frame", "num_with_teacher", "teacher_stride")
    types |= dict.fromkeys((*whole, "stride_of_slopes"), "i32") | {"stride": "i64"}
    signature = {name: "constexpr" if name in chosen else types.get(name, "*fp32") for name in function.arg_names}
    values = {(number,): chosen[name] for number, name in enumerate(function.arg_names) if name in chosen}
    compiled = triton.compile(ASTSource(function, signature, values), target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


def test_scales_are_powers_of_two_that_leave_room_in_float16_for_any_bound() -> None:
    bound = torch.tensor([0.0, 1e-45, 1e-38, 1e-6, 1.0, 3.0, 65504.0, 3e38])
    scale = fused_gpu._scale(bound)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert ((bound * scale) < 2**15).all()
    assert ((bound * scale)[3:] >= 2**13).all()


def test_a_product_of_any_number_of_rows_is_whole() -> None:
    left, right = torch.randn(3 * 4096 + 5, 8).half(), torch.randn(3 * 4096 + 5, 8).half()
    expected = left.double().mT @ right.double()
    torch.testing.assert_close(fused_gpu.chunked_product(left, right).double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tokens", [torch.float32, torch.float64])
def test_other_types_and_odd_dimensions_are_not_supported(tokens: torch.dtype) -> None:
    with mock.patch.object(torch.Tensor, "device", torch.device("cuda")):
        assert fused_gpu.is_supported(torch.empty(2, 8, 196, 768, dtype=torch.float16), torch.bfloat16)
        assert not fused_gpu.is_supported(torch.empty(2, 8, 196, 768, dtype=tokens), torch.bfloat16)
        assert not fused_gpu.is_supported(torch.empty(2, 8, 196, 768, dtype=torch.float16), torch.float32)
        assert not fused_gpu.is_supported(torch.empty(2, 8, 196, 100, dtype=torch.float16), torch.bfloat16)
        assert fused_gpu.is_supported(torch.empty(2, 1, 16, 256, dtype=torch.float16), torch.bfloat16)


def test_a_second_backward_is_an_error_and_never_a_wrong_gradient() -> None:
    attention = mock.Mock(pooled=torch.ones(1), divergence=torch.ones(2, 0))
    attention.differentiate.return_value = (torch.ones(1), torch.ones(1), torch.ones(1))
    attention.student = mock.Mock(weight=torch.ones(1), bias=torch.ones(1))
    with mock.patch.object(fused_gpu, "FusedPass", return_value=attention):
        inputs = [torch.ones(1, requires_grad=True) for _ in range(3)]
        pooled, *_ = fused_gpu.FusedAttend.apply(inputs[0], torch.ones(1), *inputs[1:], None)
        pooled.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="forward must run again"):
            pooled.sum().backward()


def test_a_teacher_keeps_its_weights_in_their_own_type_until_they_are_used() -> None:
    teacher = AudioGuidedAttention(6)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = teacher._teacher_inputs(TeacherView(teacher, torch.randn(2, 6), torch.randn(2, 2, 3, 6)))
        assert not module._is_fused("auto", inputs.tokens, inputs, torch.bfloat16)
    assert torch.equal(inputs.weight, teacher.attn_visual.weight)
