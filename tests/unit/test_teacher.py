"""Teacher, teacher cache and class features on one rank, without reading any shard."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avcil_dist.config.schema import MethodConfig
from avcil_dist.data.batch import Batch
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.heads import ProxyHead
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.training import teacher_cache
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.teacher_cache import TeacherCache, build_teacher_cache
from avcil_dist.world import World

pytestmark = pytest.mark.usefixtures("one_rank")

CPU, DIM, NOTHING = torch.device("cpu"), 4, None
SCENARIO = Scenario((("a", "b", "c"), ("d", "e")))
CLIPS = np.array([11, 13, 17, 19, 23])


class Names:
    """A manifest that knows the names of clips."""

    def __init__(self, prefix: str = "clip") -> None:
        self.prefix = prefix

    def key(self, clip: int) -> str:
        return f"{self.prefix}{clip}"

    def class_of(self, clip: int) -> str:
        return "odd" if clip % 4 == 3 else "even"


MANIFEST: Any = Names()


def batch_of(clips: list[int], valid: list[bool] | None = None) -> Batch:
    """Features that depend on the clip alone; labels are old classes."""
    numbers = torch.tensor(clips, dtype=torch.float32)
    audio = torch.sin(numbers[:, None] * torch.arange(1, DIM + 1))
    visual = torch.cos(numbers[:, None, None, None] * torch.arange(1, DIM + 1) * torch.arange(1, 7).view(2, 3, 1))
    return Batch(
        visual,
        audio,
        torch.tensor(clips) % 3,
        torch.tensor(valid or [True] * len(clips)),
        len(clips),
        ("a fault",),
        clips=np.array(clips),
    )


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> InferencePass:
    """A pass over the clips two at a time, padded, of which clip 17 cannot be read."""

    def batches(_: InferencePass, clips: np.ndarray, global_batch: int | None = None) -> Iterator[Batch]:
        for first in range(0, len(clips), 2):
            part = [int(clip) for clip in clips[first : first + 2]]
            padded = [*part, 0][:2]
            yield batch_of(padded, [clip not in (0, 17) for clip in padded])

    monkeypatch.setattr(InferencePass, "batches", batches)
    return InferencePass(NOTHING, NOTHING, NOTHING, NOTHING, CPU)  # type: ignore[arg-type]


def make_teacher(head: ProxyHead | None = None) -> Teacher:
    torch.manual_seed(3)
    return Teacher(AudioVisualNetwork(Precomputed(DIM), Precomputed(DIM), 3, head), CPU)


def method_of(name: str) -> Method:
    method = make_method(MethodConfig(name=name))
    method.begin_step(StepContext(SCENARIO, 1))
    return method


def make_cache(inference: InferencePass, teacher: Teacher, method: Method) -> tuple[TeacherCache, int]:
    """The cache, and how often the function between batches was called."""
    calls: list[None] = []
    cache = build_teacher_cache(
        lambda batch: teacher.output(batch, method), inference, CLIPS, after_batch=lambda: calls.append(None)
    )
    return cache, len(calls)


def test_the_cache_holds_each_clips_output_without_padding(inference: InferencePass) -> None:
    teacher, method = make_teacher(), method_of("avcil")
    cache, num_calls = make_cache(inference, teacher, method)
    assert num_calls == 3
    assert cache.clips is CLIPS
    assert cache.valid.tolist() == [True, True, False, True, True]
    assert len(cache.output.logits) == len(CLIPS)
    found = cache.lookup(np.array([23, 11, 11]), CPU)
    expected = teacher.output(batch_of([23, 11, 11]), method)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.audio is None
    assert cache.to(CPU) is cache


def test_a_teacher_with_a_cache_looks_its_outputs_up(inference: InferencePass) -> None:
    teacher, method = make_teacher(), method_of("avcil")
    cache, _ = make_cache(inference, teacher, method)
    teacher.use_cache(replace(cache, output=cache.output.map(lambda rows: rows + 1)))
    batch = batch_of([13, 19])
    torch.testing.assert_close(teacher.output(batch, method).logits, teacher.logits(batch) + 1)


def test_clips_without_a_teacher_output_are_masked_and_named(inference: InferencePass) -> None:
    cache, _ = make_cache(inference, make_teacher(), method_of("avcil"))
    batch = batch_of([17, 11, 17], [True, True, False])
    masked = cache.mask_missing(batch, MANIFEST)
    assert masked.valid.tolist() == [False, True, False]
    assert masked.faults == ("a fault", "clip17: could not be read for the teacher cache")
    assert batch.valid.tolist() == [True, True, False]
    others = batch_of([13, 11])
    assert cache.mask_missing(others, MANIFEST) is others
    already = batch_of([17, 11], [False, True])
    assert cache.mask_missing(already, MANIFEST) is already
    whole = replace(cache, valid=np.ones(5, dtype=bool))
    assert whole.mask_missing(batch, MANIFEST) is batch


def test_a_stored_cache_is_the_same_and_is_refused_for_other_clips(inference: InferencePass) -> None:
    head = ProxyHead(DIM, 3, 0, num_proxies=2)
    cache, _ = make_cache(inference, make_teacher(head), method_of("afc"))
    state = cache.to_state(MANIFEST)
    assert state.keys() == {"clips", "valid", "logits", "audio", "visual", "pooled", "importance"}
    names = "".join(f"{MANIFEST.class_of(clip)}/{MANIFEST.key(clip)}\n" for clip in CLIPS.tolist())
    assert names.startswith("odd/clip11\neven/clip13\n")
    assert state["clips"] == hashlib.sha256(names.encode()).hexdigest()
    loaded = TeacherCache.from_state(state, CLIPS, MANIFEST)
    assert loaded is not None
    assert loaded.clips is CLIPS
    assert loaded.valid.tolist() == cache.valid.tolist()
    for one, other in zip(loaded.output.tensors(), cache.output.tensors(), strict=True):
        assert torch.equal(one, other)
    assert loaded.output.importance is not None
    others: Any = Names("other")
    assert TeacherCache.from_state(state, CLIPS[:4], MANIFEST) is None
    assert TeacherCache.from_state(state, CLIPS, others) is None


def test_a_teacher_stays_in_evaluation_mode_and_takes_no_gradient() -> None:
    teacher = make_teacher()
    parent = torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.network.modules())
    assert teacher.train() is teacher
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    teacher.grow(5, None)
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    logits = teacher.logits(batch_of([11, 13]))
    assert logits.shape == (2, 5)
    assert not logits.is_inference()
    assert not logits.requires_grad


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_teacher_runs_in_inference_mode_unless_its_parameters_are_sharded(
    monkeypatch: pytest.MonkeyPatch, is_sharded: bool
) -> None:
    sharded: list[object] = []
    monkeypatch.setattr("avcil_dist.training.teacher.shard_out", lambda network, world: sharded.append(network))
    teacher, modes = make_teacher(), list[tuple[bool, bool]]()
    if is_sharded:
        teacher.shard(World())
    teacher.network.register_forward_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    teacher.logits(batch_of([11, 13]))
    assert modes == [(not is_sharded, False)]
    assert sharded == [teacher.network] * is_sharded
    assert not any(module.training for module in teacher.network.modules())


def test_importance_is_the_norm_of_each_clips_own_gradient() -> None:
    teacher, method, batch = make_teacher(ProxyHead(DIM, 3, 0, num_proxies=2)), method_of("afc"), batch_of([11, 13, 19])
    output = teacher.output(batch, method)
    assert not output.logits.requires_grad
    for row in range(3):

        def loss_of(pooled: Tensor, audio: Tensor, row: int = row) -> Tensor:
            visual = torch.relu(teacher.network.visual_proj(pooled))
            logits = teacher.network.classifier((audio + visual)[None])
            return method.importance_loss(batch.labels[[row]], Output(logits)).sum()

        assert output.pooled is not None
        assert output.audio is not None
        assert output.importance is not None
        pooled, audio = output.pooled[row].clone().requires_grad_(), output.audio[row].clone().requires_grad_()
        of_pooled, of_audio = torch.autograd.grad(loss_of(pooled, audio), (pooled, audio))
        # Sound and projected pictures are added: their gradients are the same.
        expected = [of_pooled.norm(), of_audio.norm(), of_audio.norm()]
        torch.testing.assert_close(output.importance[row], torch.stack(expected))
    assert output.importance.min() > 0


def test_a_teachers_view_is_of_the_exemplars() -> None:
    teacher, batch = make_teacher(), replace(batch_of([11, 13, 19]), num_current=1)
    view = teacher.attention_view(batch)
    assert torch.equal(view.audio, batch.audio[1:])
    assert torch.equal(view.visual, batch.visual[1:])
    assert view.attention is teacher.network.attention


def test_features_of_classes_are_those_of_their_readable_clips(inference: InferencePass) -> None:
    network = make_teacher().network
    classes = {"b": np.array([13, 17, 11]), "none": np.array([], dtype=np.int64), "a": np.array([23, 19])}
    found = inference.class_features(network, classes)
    assert list(found) == ["b", "none", "a"]
    for name, clips in (("b", [13, 11]), ("none", []), ("a", [23, 19])):
        assert found[name].clips.tolist() == clips
        assert found[name].features.shape == (len(clips), DIM)
        if clips:
            batch = batch_of(clips)
            torch.testing.assert_close(found[name].features, network(batch.visual, batch.audio).feature.detach())
    nothing = inference.class_features(network, {"x": np.array([], dtype=np.int64)})
    assert nothing["x"].features.shape == (0, 0)
    assert nothing["x"].clips.tolist() == []


def test_encoders_shared_with_the_student_run_once_for_both_modalities() -> None:
    class Frozen(Precomputed):
        """An encoder whose output is its input plus 1."""

        def encode_if_frozen(self, inputs: Tensor) -> Tensor:
            return inputs + 1

    teacher = Teacher(AudioVisualNetwork(Frozen(DIM), Frozen(DIM), 3), CPU)
    batch = batch_of([11, 13])
    encoded = teacher.encode_shared(batch)
    assert torch.equal(encoded.visual, batch.visual + 1)
    assert torch.equal(encoded.audio, batch.audio + 1)
    assert encoded.clips is batch.clips
    unchanged = make_teacher().encode_shared(batch)
    assert unchanged.visual is batch.visual
    assert unchanged.audio is batch.audio


@pytest.mark.parametrize(("times_its_size", "is_moved"), [(11, True), (10, True), (9, False)])
def test_a_cache_moves_to_a_gpu_that_has_ten_times_its_size_free(
    monkeypatch: pytest.MonkeyPatch, times_its_size: int, is_moved: bool
) -> None:
    output = Output(torch.zeros(5, 3), pooled=torch.zeros(5, 4, dtype=torch.float64))
    cache = TeacherCache(CLIPS, np.ones(5, dtype=bool), output)
    size = 5 * 3 * 4 + 5 * 4 * 8
    moves: list[None] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (times_its_size * size, 0))
    monkeypatch.setattr(Output, "map", lambda self, _: moves.append(None) or self)
    assert (cache.to(torch.device("cuda")) is cache) is not is_moved
    assert len(moves) == is_moved


def test_values_go_to_a_gpu_from_pinned_memory_and_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, copies = torch.device("cuda"), list[tuple[torch.device, dict[str, bool]]]()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda own: own + 1)
    monkeypatch.setattr(torch.Tensor, "to", lambda own, device, **options: copies.append((device, options)) or own)
    assert teacher_cache._to(torch.zeros(2), gpu).tolist() == [1, 1]
    assert copies == [(gpu, {"non_blocking": True})]
