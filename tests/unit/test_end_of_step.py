"""Closed-form training and exemplar selection on one rank, with clips whose features are written out."""

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.data.batch import Batch
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY, ExemplarMemory
from avcil_dist.errors import ArtifactError
from avcil_dist.methods.base import ClosedFormMethod, Needs, StepContext, Targets
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.streams.exemplar_logits import ExemplarLogits
from avcil_dist.training import closed_form
from avcil_dist.training.closed_form import train_closed_form
from avcil_dist.training.exemplar_logits import store_logits, stored_rows
from avcil_dist.training.exemplars import exemplar_clips, exemplar_features, update_memory
from avcil_dist.training.inference_pass import ClassFeatures
from tests.helpers.artifacts import make_artifact

pytestmark = pytest.mark.usefixtures("one_rank")

SCENARIO = Scenario((("a", "b"), ("c",)))
# Clip numbers by class and split; the label is that of the class.
CLIPS = {
    ("a", "train"): [0, 1, 2],
    ("b", "train"): [3],
    ("c", "train"): [10, 11, 12, 13],
    ("a", "val"): [20, 21],
    ("b", "val"): [22],
    ("c", "val"): [23, 24],
}
DAMAGED = {11, 24}


class Manifest:
    """Numbers and keys of the clips."""

    def __init__(self, clips: Mapping[tuple[str, str], list[int]] = CLIPS) -> None:
        self.numbers = clips

    def clips(self, classes: Sequence[str], split: str) -> np.ndarray:
        return np.array([clip for name in classes for clip in self.numbers.get((name, split), [])], dtype=np.int64)

    def key(self, clip: int) -> str:
        return f"clip{clip}"

    def clip_numbers(self, name: str, keys: Sequence[str]) -> np.ndarray:
        return np.array([int(key.removeprefix("clip")) for key in keys], dtype=np.int64)


def features_of(clips: Sequence[int]) -> Tensor:
    return torch.tensor([[float(clip), 1.0] for clip in clips]).reshape(-1, 2)


class Inference:
    """Passes of two clips at a time; damaged clips are not valid."""

    def run(self, network: object, clips: np.ndarray) -> Iterator[tuple[Batch, Output]]:
        del network
        labels = {clip: SCENARIO.labels[name] for (name, _), numbers in CLIPS.items() for clip in numbers}
        for first in range(0, len(clips), 2):
            part = [int(clip) for clip in clips[first : first + 2]]
            rows = features_of(part)
            valid = torch.tensor([clip not in DAMAGED for clip in part])
            yield Batch(rows, rows, torch.tensor([labels[clip] for clip in part]), valid, len(part)), Output(rows)

    def class_features(self, network: object, clips: Mapping[str, np.ndarray]) -> dict[str, ClassFeatures]:
        del network
        good = {name: [int(clip) for clip in numbers if clip not in DAMAGED] for name, numbers in clips.items()}
        return {name: ClassFeatures(np.array(own, dtype=np.int64), features_of(own)) for name, own in good.items()}


class Recording(ClosedFormMethod):
    """A method with three candidates: the first predicts class a, the second class b, the third class c."""

    def __init__(self) -> None:
        super().__init__(None)
        self.accumulated: list[tuple[int, int]] = []
        self.total = torch.zeros(1)
        self.chosen: tuple[list[float], list[float]] | None = None
        self.counts: dict[int, int] = {}

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        raise NotImplementedError

    def begin_sums(self, counts: Mapping[int, int]) -> None:
        assert not self.accumulated
        self.counts = dict(counts)

    def accumulate(self, output: Output, labels: Tensor) -> None:
        self.accumulated += zip(output.logits[:, 0].int().tolist(), labels.tolist(), strict=True)
        self.total += len(labels)

    def statistics(self) -> list[Tensor]:
        return [self.total]

    def solve(self) -> Tensor:
        return torch.arange(3.0)[:, None] + 100 * self.total

    def candidate_scores(self, output: Output, candidates: Tensor) -> Tensor:
        favourite = (candidates[:, 0] % 100).long()
        return torch.nn.functional.one_hot(favourite, 3)[:, None, :].expand(3, len(output.logits), 3)

    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        self.chosen = candidates[:, 0].tolist(), list(accuracies)


def make_step(method: object, number: int = 1, *, size: int = 4, selection: str = "published", **more: Any) -> Any:
    memory = SimpleNamespace(size=size, selection=selection)
    return SimpleNamespace(
        config=SimpleNamespace(memory=memory, seed=0),
        manifest=Manifest(),
        method=method,
        device=torch.device("cpu"),
        context=StepContext(SCENARIO, number),
        new_classes=SCENARIO.new(number),
        current_clips=Manifest().clips(SCENARIO.new(number), "train"),
        seen_classes=SCENARIO.seen(number),
        **more,
    )


def test_closed_form_training_uses_the_readable_clips_of_the_new_classes_and_validates_on_all_seen_ones() -> None:
    method, inference = Recording(), Inference()
    accuracy = train_closed_form(make_step(method), None, inference)  # type: ignore[arg-type]
    assert method.accumulated == [(10, 2), (12, 2), (13, 2)]
    # Of the readable validation clips two are of class a, one of b, one of c.
    assert method.chosen == ([300, 301, 302], [0.5, 0.25, 0.25])
    assert accuracy == 0.5


def test_closed_form_training_begins_with_the_number_of_training_clips_of_each_new_class() -> None:
    for number, counts in ((0, {0: 3, 1: 1}), (1, {2: 4})):
        method = Recording()
        train_closed_form(make_step(method, number), None, Inference())  # type: ignore[arg-type]
        assert method.counts == counts


def test_a_method_that_gathers_gets_the_readable_clips_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second rank with the same clips: those of each batch follow those of this rank.
    monkeypatch.setattr(closed_form, "gather_rows", lambda rows, _: torch.cat([rows, rows]))
    method = Recording()
    method.gathers = True
    train_closed_form(make_step(method), None, Inference())  # type: ignore[arg-type]
    assert method.accumulated == [(10, 2), (10, 2), (12, 2), (13, 2), (12, 2), (13, 2)]


def test_closed_form_training_adds_up_statistics_hits_and_clips_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second rank with the same clips: every sum is twice that of this rank, and each accuracy stays the same.
    reduced: list[list[float]] = []

    def all_reduce(total: Tensor) -> None:
        reduced.append(total.tolist())
        total.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    method, inference = Recording(), Inference()
    accuracy = train_closed_form(make_step(method), None, inference)  # type: ignore[arg-type]
    assert reduced == [[3], [2, 1, 1], [4]]
    assert method.chosen == ([600, 601, 602], [0.5, 0.25, 0.25])
    assert accuracy == 0.5


def test_closed_form_training_without_validation_clips_chooses_without_accuracies() -> None:
    method, step = Recording(), make_step(Recording())
    step.method, step.manifest = method, Manifest({("c", "train"): [10, 12]})
    step.current_clips = step.manifest.clips(step.new_classes, "train")
    assert train_closed_form(step, None, Inference()) is None  # type: ignore[arg-type]
    assert method.chosen == ([200, 201, 202], [])


HERDING, RANDOM = Needs(memory="replay", selection="herding"), Needs(memory="replay")


def test_herding_selects_readable_clips_and_the_memory_keeps_its_size() -> None:
    inference: Any = Inference()
    memory = update_memory(make_step(None, 0, needs=HERDING), EMPTY_MEMORY, None, inference)  # type: ignore[arg-type]
    assert {name: len(keys) for name, keys in memory.keys.items()} == {"a": 2, "b": 1}
    memory = update_memory(make_step(None, 1, needs=HERDING), memory, None, inference)  # type: ignore[arg-type]
    assert {name: len(keys) for name, keys in memory.keys.items()} == {"a": 1, "b": 1, "c": 1}
    # The mean of the unit-norm features of clips 10, 12 and 13 is nearest to that of clip 12.
    assert memory.keys["c"] == ("clip12",)
    features = exemplar_features(make_step(None, 1), memory, None, inference)  # type: ignore[arg-type]
    assert [rows.shape for rows in features] == [(1, 2)] * 3
    assert features[2].tolist() == [[12.0, 1.0]]
    clips = exemplar_clips(Manifest(), memory)  # type: ignore[arg-type]
    assert clips.tolist()[1:] == [3, 12]


def test_exemplars_keep_the_logits_of_their_own_step() -> None:
    inference: Any = Inference()
    before, after = (
        ExemplarMemory({"a": ("clip2", "clip0")}),
        ExemplarMemory({"a": ("clip2",), "c": ("clip11", "clip13")}),
    )
    needs = Needs(memory="replay", stored_logits=True)
    step = make_step(None, 1, needs=needs)
    stored = ExemplarLogits(torch.tensor([[5.0], [6.0]]), torch.tensor([1, 1]))
    previous: Any = SimpleNamespace(memory=before, exemplar_logits=stored, step=0)
    step.context = SimpleNamespace(num_seen=2)  # as many columns as the clips' features
    logits = store_logits(step, previous, after, None, inference)  # type: ignore[arg-type]
    assert logits is not None
    # clip 2 has the logit of step 0; clip 11 is damaged; the outputs of clip 13 are its features
    assert logits.values.tolist() == [[5, 0], [0, 0], [13, 1]]
    assert logits.counts.tolist() == [1, 0, 2]
    assert store_logits(make_step(None, 1, needs=Needs()), previous, after, None, inference) is None  # type: ignore[arg-type]
    previous.memory, previous.exemplar_logits = after, logits
    rows = stored_rows(step, previous)
    assert rows is not None
    values, counts = rows.lookup(np.array([13, 7, 2, 99, -1]), torch.device("cpu"))
    assert values.tolist() == [[13, 1], [0, 0], [5, 0], [0, 0], [0, 0]]
    assert counts.tolist() == [2, 0, 1, 0, 0]
    assert stored_rows(step, None) is None
    previous.exemplar_logits, step.config = None, make_artifact().config
    with pytest.raises(ArtifactError, match=r"^runs/tiny-avcil-seed0/step_000: has no logits of its exemplars"):
        stored_rows(step, previous)


@pytest.mark.parametrize(
    ("needs", "selection", "passes"),
    [(HERDING, "published", 1), (RANDOM, "published", 0), (HERDING, "random", 0), (RANDOM, "herding", 1)],
)
def test_the_settings_select_instead_of_the_published_selection(
    monkeypatch: pytest.MonkeyPatch, needs: Needs, selection: str, passes: int
) -> None:
    calls: list[None] = []
    compute = Inference.class_features
    monkeypatch.setattr(Inference, "class_features", lambda *given: calls.append(None) or compute(*given))
    step = make_step(None, 1, needs=needs, selection=selection)
    memory = update_memory(step, EMPTY_MEMORY, None, Inference())  # type: ignore[arg-type]
    assert len(calls) == passes
    assert set(memory.keys) == {"c"}
    assert set(memory.keys["c"]) <= {"clip10", "clip11", "clip12", "clip13"}


def test_a_method_without_memory_keeps_it_unchanged() -> None:
    memory = update_memory(make_step(None, 1, needs=Needs()), EMPTY_MEMORY, None, Inference())  # type: ignore[arg-type]
    assert memory is EMPTY_MEMORY
    assert exemplar_clips(Manifest(), memory).tolist() == []  # type: ignore[arg-type]
