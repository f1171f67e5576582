import math

import pytest
import torch
from torch import Tensor

from avcil_dist.methods.losses import (
    attention_distillation,
    class_contrast,
    cross_entropy,
    instance_contrast,
    separated_softmax,
    task_distillation,
)
from avcil_dist.models.outputs import Divergence

LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)


def leaf(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def assert_zero_with_a_graph(loss: Tensor, *leaves: Tensor) -> None:
    assert loss.item() == 0
    loss.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_cross_entropy_is_the_mean_over_the_batch() -> None:
    logits = leaf([[0.0, 0.0], [LOG3, 0.0]])
    loss = cross_entropy(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((LOG2 + LOG4) / 2)


def test_current_clips_see_new_classes_and_exemplars_old_ones() -> None:
    # One old class and two new: the exemplar's single old logit is certain, whatever it is.
    logits = leaf([[9.0, 0.0, 0.0], [9.0, LOG3, 0.0], [-5.0, 1.0, 2.0]])
    loss = separated_softmax(logits, torch.tensor([1, 2, 0]), num_current=2, num_old=1)
    assert loss.item() == pytest.approx((LOG2 + LOG4) / 3)
    loss.backward()
    assert torch.equal(logits.grad[:2, 0], torch.zeros(2))
    assert torch.equal(logits.grad[2], torch.zeros(3))


def test_separated_softmax_without_exemplars_averages_current_clips() -> None:
    loss = separated_softmax(leaf([[9.0, 0.0, 0.0]]), torch.tensor([1]), num_current=1, num_old=1)
    assert loss.item() == pytest.approx(LOG2)


def test_separated_softmax_without_current_clips_averages_exemplars() -> None:
    loss = separated_softmax(leaf([[0.0, 0.0, 9.0]]), torch.tensor([1]), num_current=0, num_old=2)
    assert loss.item() == pytest.approx(LOG2)


def test_separated_softmax_without_old_classes_is_cross_entropy() -> None:
    logits, labels = leaf([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([1, 0])
    assert separated_softmax(logits, labels, 2, 0).item() == pytest.approx(cross_entropy(logits, labels).item())


def test_task_distillation_sums_over_tasks_and_ignores_new_classes() -> None:
    # At T = 2 the teacher's first task is (3/4, 1/4); the second is equal in both and adds nothing.
    logits = leaf([[0.0, 0.0, 1.0, 2.0, 3.0, 50.0], [4.0, 4.0, 1.0, 2.0, 3.0, -50.0]])
    teacher = torch.tensor([[2 * LOG3, 0.0, 1.0, 2.0, 3.0], [2 * LOG3, 0.0, 1.0, 2.0, 3.0]])
    loss = task_distillation(logits, teacher, [slice(0, 2), slice(2, 5)], temperature=2)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss.item() == pytest.approx(4 * kl, rel=1e-6)
    loss.backward()
    assert torch.equal(logits.grad[:, 5], torch.zeros(2))


def test_task_distillation_gives_the_teacher_no_gradient() -> None:
    logits, teacher = leaf([[1.0, 0.0]]), leaf([[0.0, 1.0]])
    task_distillation(logits, teacher, [slice(0, 2)], temperature=2).backward()
    assert teacher.grad is None
    assert logits.grad.abs().sum() > 0


def test_task_distillation_without_old_tasks_is_zero() -> None:
    logits = leaf([[1.0, math.inf]])
    assert_zero_with_a_graph(task_distillation(logits, torch.zeros(1, 0), [], temperature=2), logits)


def test_instance_contrast_has_the_clips_own_pictures_as_target() -> None:
    # Unit features are the axes, so scores are 1 on the diagonal and 0 beside it, whatever the norms.
    audio, visual = leaf([[3.0, 0.0], [0.0, 0.1]]), leaf([[1.0, 0.0], [0.0, 7.0]])
    loss = instance_contrast(audio, visual, temperature=1 / LOG3)
    assert loss.item() == pytest.approx(-math.log(3 / 4))


def test_instance_contrast_normalises_over_the_pictures_of_each_sound() -> None:
    # Both sounds are nearest to the first pictures: rows are (3, 1)/4 both; by columns it would be 1/2.
    audio, visual = leaf([[1.0, 0.0], [1.0, 0.0]]), leaf([[1.0, 0.0], [0.0, 1.0]])
    loss = instance_contrast(audio, visual, temperature=1 / LOG3)
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)


@pytest.mark.parametrize(("variant", "divisors"), [("released", (3, 3, 3)), ("paper", (2, 2, 1))])
def test_class_contrast_divides_by_batch_or_by_matches(variant: str, divisors: tuple[int, int, int]) -> None:
    # All scores are equal, so each log-probability is -log 3; the clips of label 0 have two matches.
    same = [[1.0, 0.0]] * 3
    loss = class_contrast(leaf(same), leaf(same), torch.tensor([0, 0, 1]), temperature=0.05, variant=variant)
    matches = (2, 2, 1)
    assert loss.item() == pytest.approx(sum(m * LOG3 / d for m, d in zip(matches, divisors, strict=True)) / 3)


def test_paper_class_contrast_of_clips_all_of_other_classes_is_instance_contrast() -> None:
    torch.manual_seed(0)
    audio, visual = torch.rand(4, 3), torch.rand(4, 3)
    loss = class_contrast(audio, visual, torch.arange(4), 0.05, "paper")
    torch.testing.assert_close(loss, instance_contrast(audio, visual, 0.05))


def test_contrast_of_a_silent_feature_has_finite_gradients() -> None:
    audio, visual = leaf([[0.0, 0.0], [1.0, 2.0]]), leaf([[1.0, 0.0], [0.0, 0.0]])
    instance_contrast(torch.relu(audio), torch.relu(visual), 0.05).backward()
    assert audio.grad.isfinite().all()
    assert visual.grad.isfinite().all()


def test_attention_distillation_weighs_both_means() -> None:
    divergence = Divergence(spatial=torch.tensor([1.0, 3.0]), temporal=torch.tensor([10.0, 30.0]))
    assert attention_distillation(divergence, 0.25).item() == pytest.approx(0.25 * 2 + 0.75 * 20)


def test_attention_distillation_without_exemplars_is_zero() -> None:
    spatial, temporal = torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)
    assert_zero_with_a_graph(attention_distillation(Divergence(spatial, temporal), 0.5), spatial, temporal)


def test_every_term_of_an_empty_batch_is_zero() -> None:
    logits, audio, visual = (torch.zeros(0, width, requires_grad=True) for width in (3, 2, 2))
    labels = torch.zeros(0, dtype=torch.long)
    assert_zero_with_a_graph(cross_entropy(logits, labels), logits)
    assert_zero_with_a_graph(separated_softmax(logits, labels, 0, 1), logits)
    assert_zero_with_a_graph(task_distillation(logits, torch.zeros(0, 1), [slice(0, 1)], 2), logits)
    assert_zero_with_a_graph(instance_contrast(audio, visual, 0.05), audio, visual)
    for variant in ("released", "paper"):
        assert_zero_with_a_graph(class_contrast(audio, visual, labels, 0.05, variant), audio, visual)
