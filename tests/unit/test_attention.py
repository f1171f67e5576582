"""Attention against its definition, written out with maps and differentiated by autograd."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from avcil_dist.models.attention import fused, kernels_cpu, kernels_triton
from avcil_dist.models.attention.kernels_cpu import cpu_kernels
from avcil_dist.models.attention.module import AudioGuidedAttention, Choice, TeacherView
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.system.trusted_files import make_private_folder
from tests.helpers.attention import defined

CLIPS, FRAMES, POSITIONS, DIM = 5, 3, 4, 6
NUM_WITH_TEACHER = 2
needs_compiler = pytest.mark.skipif(cpu_kernels() is None, reason="no C++ compiler")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def student() -> AudioGuidedAttention:
    return AudioGuidedAttention(DIM).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return draw(CLIPS, DIM), draw(CLIPS, FRAMES, POSITIONS, DIM)


@pytest.fixture
def view(batch: tuple[Tensor, Tensor]) -> TeacherView:
    """A teacher of the last rows; copies of them, for gradcheck changes its inputs in place."""
    audio, visual = (rows[-NUM_WITH_TEACHER:].clone() for rows in batch)
    return TeacherView(AudioGuidedAttention(DIM).double(), audio, visual)


def computed(
    student: AudioGuidedAttention, audio: Tensor, visual: Tensor, view: TeacherView | None
) -> tuple[Tensor, ...]:
    pooled, divergence = student(audio, visual, view)
    return (pooled,) if divergence is None else (pooled, divergence.spatial, divergence.temporal)


def gradients_of(
    function: Callable[..., tuple[Tensor, ...]],
    student: AudioGuidedAttention,
    batch: tuple[Tensor, Tensor],
    view: TeacherView | None,
    *,
    tokens_too: bool,
) -> list[Tensor]:
    """Results and gradients of a sum in which every result has a weight of its own."""
    audio, visual = batch[0].clone().requires_grad_(), batch[1].clone().requires_grad_(tokens_too)
    results = function(student, audio, visual, view)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    total = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    inputs = [audio, *([visual] if tokens_too else []), *student.parameters()]
    return [*(result.detach() for result in results), *torch.autograd.grad(total, inputs)]


def test_maps_sum_to_one(student: AudioGuidedAttention, batch: tuple[Tensor, Tensor]) -> None:
    spatial, temporal = student.maps(*batch)
    torch.testing.assert_close(spatial.sum(2), torch.ones(CLIPS, FRAMES, DIM, dtype=torch.float64))
    torch.testing.assert_close(temporal.sum(1), torch.ones(CLIPS, DIM, dtype=torch.float64))


@pytest.mark.parametrize("saved_to_tokens", [0, 1, 100])
@pytest.mark.parametrize("clips_per_tile", [1, 2, CLIPS])
@pytest.mark.parametrize("tokens_too", [False, True])
@pytest.mark.parametrize("compared", [False, True])
def test_results_and_gradients_are_those_of_the_definition(
    student: AudioGuidedAttention,
    batch: tuple[Tensor, Tensor],
    view: TeacherView,
    monkeypatch: pytest.MonkeyPatch,
    saved_to_tokens: float,
    clips_per_tile: int,
    tokens_too: bool,
    compared: bool,
) -> None:
    monkeypatch.setattr(fused, "TILE_BYTES", {"cpu": clips_per_tile * FRAMES * POSITIONS * DIM * 8})
    monkeypatch.setattr(fused, "SAVED_TO_TOKENS", saved_to_tokens)
    chosen_view = view if compared else None
    ours = gradients_of(computed, student, batch, chosen_view, tokens_too=tokens_too)
    torch.testing.assert_close(ours, gradients_of(defined, student, batch, chosen_view, tokens_too=tokens_too))
    if compared:
        assert all((part > 1e-4).all() for part in ours[1:3])


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 5)])
def test_gradcheck(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    frames, positions, dim = shape
    student = AudioGuidedAttention(dim).double()
    audio, visual = draw(3, dim), draw(3, frames, positions, dim)
    view = TeacherView(AudioGuidedAttention(dim).double(), audio[2:].clone(), visual[2:].clone())
    names = [name for name, _ in student.named_parameters()]

    def run(audio: Tensor, visual: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        pooled, divergence = torch.func.functional_call(
            student, dict(zip(names, weights, strict=True)), (audio, visual, view)
        )
        return pooled, divergence.spatial, divergence.temporal

    inputs = [tensor.detach().requires_grad_() for tensor in (audio, visual, *student.parameters())]
    assert torch.autograd.gradcheck(run, inputs)
    assert all(parameter.grad is None for parameter in view.attention.parameters())


def test_a_teacher_equal_to_the_student_has_no_divergence(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor]
) -> None:
    _, divergence = student(*batch, TeacherView(student, *batch))
    torch.testing.assert_close(divergence.spatial, torch.zeros(CLIPS, dtype=torch.float64))
    torch.testing.assert_close(divergence.temporal, torch.zeros(CLIPS, dtype=torch.float64))


def large(tokens: torch.dtype) -> tuple[AudioGuidedAttention, tuple[Tensor, Tensor], TeacherView]:
    """A float32 student of more channels than a thread's piece, no whole number of vectors, and many positions."""
    clips, dim = 4, 275
    audio, visual = torch.randn(clips, dim), torch.randn(clips, 3, 100, dim).to(tokens)
    return AudioGuidedAttention(dim), (audio, visual), TeacherView(AudioGuidedAttention(dim), audio[3:], visual[3:])


@needs_compiler
@pytest.mark.parametrize("tokens", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens_too", [False, True])
def test_compiled_kernels_give_what_float64_gives(tokens: torch.dtype, tokens_too: bool) -> None:
    student, batch, view = large(tokens)
    ours = gradients_of(computed, student, batch, view, tokens_too=tokens_too)
    exact = TeacherView(view.attention.double(), view.audio.double(), view.visual.double())
    theirs = gradients_of(defined, student.double(), tuple(t.double() for t in batch), exact, tokens_too=tokens_too)
    for mine, true in zip(ours, theirs, strict=True):
        tolerance = 1e-5 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps
        assert (mine.double() - true).norm() <= tolerance * max(1, true.norm())


@pytest.mark.slow
def test_triton_kernels_give_what_torch_gives() -> None:
    """In a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.helpers.triton_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.float32", "torch.bfloat16", "torch.float16"]


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("kernel", ["_attend", "_compare", "_differentiate"])
def test_triton_kernels_are_compiled_without_a_gpu(kernel: str, keys: str) -> None:
    function = getattr(kernels_triton, kernel)
    sizes = {"ROWS": kernels_triton.POSITIONS, "LANES": kernels_triton.CHANNELS}
    chosen = {"STORE": True, "MOMENTS": True, "HAS_TEACHER": True, **sizes}
    types = dict.fromkeys(("keys", "bias", "student", "teacher_keys", "out"), keys) | {"tokens": "*fp16"}
    types |= dict.fromkeys(("frames", "positions", "dim"), "i32") | {"stride": "i64"}
    signature = {name: "constexpr" if name in chosen else types.get(name, "*fp32") for name in function.arg_names}
    values = {(number,): chosen[name] for number, name in enumerate(function.arg_names) if name in chosen}
    compiled = triton.compile(ASTSource(function, signature, values), target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


@pytest.mark.parametrize("choice", ["torch", pytest.param("auto", marks=needs_compiler)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_results_are_close_and_gradients_in_float32(choice: str, dtype: torch.dtype) -> None:
    student, batch, view = large(torch.float16)
    full = gradients_of(computed, student, batch, view, tokens_too=False)
    student.choice = choice
    with torch.autocast("cpu", dtype):
        half = gradients_of(computed, student, batch, view, tokens_too=False)
    for ours, true in zip(half, full, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - true).norm() <= 0.03 * true.norm()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_call_gives_the_same_bits_for_any_threads_memory_and_tiles(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, batch, view = large(torch.float16)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return gradients_of(computed, student, batch, view, tokens_too=False)

    first, again = run(), run()
    assert all(map(torch.equal, first, again))
    monkeypatch.setattr(fused, "SAVED_TO_TOKENS", 0)
    recomputed = run()
    assert all(map(torch.equal, first[:3], recomputed[:3]))
    torch.testing.assert_close(recomputed, first, rtol=1e-2, atol=1e-2)


def test_nothing_of_the_tokens_size_is_saved_for_clips_without_a_teacher() -> None:
    attention = AudioGuidedAttention(8)
    audio, visual = torch.randn(CLIPS, 8), torch.randn(CLIPS, 3, 40, 8)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        attention(audio, visual)
    others = [tensor for tensor in saved if tensor.data_ptr() != visual.data_ptr()]
    assert len(others) < len(saved)
    assert max(tensor.numel() for tensor in others) < visual.numel() / 2


def test_a_teacher_of_no_rows_gives_an_empty_divergence(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor], view: TeacherView
) -> None:
    pooled, divergence = student(*batch, TeacherView(view.attention, view.audio[:0], view.visual[:0]))
    torch.testing.assert_close(pooled, student(*batch)[0])
    assert divergence.spatial.shape == divergence.temporal.shape == (0,)


@pytest.mark.parametrize("choice", ["torch", "auto"])
def test_large_inputs_do_not_overflow(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor], choice: Choice
) -> None:
    student.choice = choice
    pooled, _ = student.float()(batch[0].float() * 1e6, batch[1].float() * 1e6)
    assert pooled.isfinite().all()


def test_half_precision_pools_close_to_full(student: AudioGuidedAttention, batch: tuple[Tensor, Tensor]) -> None:
    audio, visual = (tensor.bfloat16() for tensor in batch)
    full = student.float()(audio.float(), visual.float())[0]
    half = student.bfloat16()(audio, visual)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def test_a_network_gives_the_same_in_inference_mode_and_a_teacher_may_view_there() -> None:
    network = AudioVisualNetwork(Precomputed(DIM), Precomputed(DIM), num_classes=3)
    visual, audio = torch.randn(CLIPS, FRAMES, POSITIONS, DIM), torch.randn(CLIPS, DIM)
    with torch.inference_mode():
        inferred = network(visual, audio).logits
        view = AudioVisualNetwork(Precomputed(DIM), Precomputed(DIM), num_classes=2).attention_view(
            visual[3:], audio[3:]
        )[0]
        view = TeacherView(view.attention, view.audio.clone(), view.visual.clone())
    output = network(visual, audio, view)
    torch.testing.assert_close(output.logits, inferred)
    output.divergence.spatial.sum().backward()
    assert network.attention.attn_visual.weight.grad.abs().sum() > 0


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o700])
def test_a_library_that_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    name = kernels_cpu._compiled().name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = make_private_folder(tmp_path / "avcil-dist") / name
    (tmp_path / "elsewhere").write_bytes(b"planted")
    if mode == 0o700:  # a link, in a folder of the user's own
        planted.symlink_to(tmp_path / "elsewhere")
    else:
        planted.write_bytes(b"planted")
    planted.parent.chmod(mode)
    compiled = kernels_cpu._compiled()
    assert compiled.read_bytes()[:4] == b"\x7fELF"
    if mode == 0o700:
        assert compiled == planted
        assert not compiled.is_symlink()
        assert kernels_cpu._compiled() == compiled
    else:
        assert compiled.parent.stat().st_mode & 0o777 == 0o700
        assert planted.read_bytes() == b"planted"
    assert (tmp_path / "elsewhere").read_bytes() == b"planted"
