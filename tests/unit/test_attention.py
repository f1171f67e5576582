import pytest
import torch
from torch import Tensor

from avcil_dist.models import attention as attention_module
from avcil_dist.models.attention import AudioGuidedAttention, TeacherView
from avcil_dist.models.encoders import Precomputed
from avcil_dist.models.network import AudioVisualNetwork

CLIPS, FRAMES, POSITIONS, DIM = 5, 3, 4, 6


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
    """A teacher of the last two rows; copies of them, for gradcheck changes its inputs in place."""
    audio, visual = batch
    return TeacherView(AudioGuidedAttention(DIM).double(), audio[-2:].clone(), visual[-2:].clone())


def test_pooled_is_the_tokens_mean_weighted_by_the_maps(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor]
) -> None:
    audio, visual = batch
    spatial, temporal = student.maps(audio, visual)
    torch.testing.assert_close(spatial.sum(2), torch.ones(CLIPS, FRAMES, DIM, dtype=torch.float64))
    torch.testing.assert_close(temporal.sum(1), torch.ones(CLIPS, DIM, dtype=torch.float64))
    pooled, divergence = student(audio, visual)
    torch.testing.assert_close(pooled, (temporal.unsqueeze(2) * spatial * visual).sum(dim=(1, 2)))
    assert divergence is None


def test_divergence_is_the_kl_of_the_maps_of_the_last_rows(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor], view: TeacherView
) -> None:
    audio, visual = batch
    _, divergence = student(audio, visual, view)
    for part, ours, theirs in zip(
        (divergence.spatial, divergence.temporal),
        student.maps(audio[-2:], visual[-2:]),
        view.attention.maps(view.audio, view.visual),
        strict=True,
    ):
        torch.testing.assert_close(part, (theirs * (theirs / ours).log()).flatten(1).sum(1))
        assert (part > 1e-4).all()


def test_a_teacher_equal_to_the_student_has_no_divergence(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor]
) -> None:
    _, divergence = student(*batch, TeacherView(student, *batch))
    torch.testing.assert_close(divergence.spatial, torch.zeros(CLIPS, dtype=torch.float64))
    torch.testing.assert_close(divergence.temporal, torch.zeros(CLIPS, dtype=torch.float64))


@pytest.mark.parametrize("clips_per_chunk", [1, 2, CLIPS])
def test_gradients_are_right_in_chunks_of_any_size(
    student: AudioGuidedAttention,
    batch: tuple[Tensor, Tensor],
    view: TeacherView,
    monkeypatch: pytest.MonkeyPatch,
    clips_per_chunk: int,
) -> None:
    monkeypatch.setattr(attention_module, "CHUNK_BYTES", clips_per_chunk * FRAMES * POSITIONS * DIM * 8)
    names = [name for name, _ in student.named_parameters()]

    def run(audio: Tensor, visual: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        pooled, divergence = torch.func.functional_call(
            student, dict(zip(names, weights, strict=True)), (audio, visual, view)
        )
        return pooled, divergence.spatial, divergence.temporal

    inputs = [tensor.detach().requires_grad_() for tensor in (*batch, *student.parameters())]
    assert torch.autograd.gradcheck(run, inputs)
    assert all(parameter.grad is None for parameter in view.attention.parameters())


def test_chunks_give_what_the_whole_batch_gives(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor], view: TeacherView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[Tensor]:
        student.zero_grad()
        pooled, divergence = student(*batch, view)
        (pooled.square().sum() + divergence.spatial.sum() + divergence.temporal.sum()).backward()
        return [pooled, divergence.spatial, divergence.temporal, *(p.grad.clone() for p in student.parameters())]

    whole = run()
    monkeypatch.setattr(attention_module, "CHUNK_BYTES", 1)
    torch.testing.assert_close(run(), whole)


def test_no_map_is_kept_for_the_backward_pass(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor], view: TeacherView
) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    audio, visual = batch
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(audio, visual, view)
    inputs = {audio.untyped_storage().data_ptr(), visual.untyped_storage().data_ptr()}
    assert all(t.numel() < visual[0].numel() or t.untyped_storage().data_ptr() in inputs for t in kept)


def test_a_teacher_of_no_rows_gives_an_empty_divergence(
    student: AudioGuidedAttention, batch: tuple[Tensor, Tensor], view: TeacherView
) -> None:
    pooled, divergence = student(*batch, TeacherView(view.attention, view.audio[:0], view.visual[:0]))
    torch.testing.assert_close(pooled, student(*batch)[0])
    assert divergence.spatial.shape == divergence.temporal.shape == (0,)


def test_large_inputs_do_not_overflow(student: AudioGuidedAttention, batch: tuple[Tensor, Tensor]) -> None:
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
        view = AudioVisualNetwork(Precomputed(DIM), Precomputed(DIM), num_classes=2).view(visual, audio, slice(3, None))
        view = TeacherView(view.attention, view.audio.clone(), view.visual.clone())
    output = network(visual, audio, view)
    torch.testing.assert_close(output.logits, inferred)
    output.divergence.spatial.sum().backward()
    assert network.attention.attn_visual.weight.grad.abs().sum() > 0
