"""Each method's total loss, needs and state, against numbers worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from avcil_dist.config.schema import MethodConfig
from avcil_dist.methods import make_method, method_names
from avcil_dist.methods.base import Method, StepContext, StoredLogits, Targets
from avcil_dist.methods.nearest_mean import NearestMean
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Divergence, Output
from avcil_dist.scenario import Scenario

LOG2, LOG3, LOG4, LOG6, LOG8 = (math.log(number) for number in (2, 3, 4, 6, 8))
SCENARIO = Scenario((("a", "b"), ("c", "d")))
# Two clips of new classes and an exemplar; exponentials of the logits are (1, 1, 1, 3) twice, and (1, 1, 2, 4).
LOGITS = torch.tensor([[0, 0, 0, LOG3], [0, 0, 0, LOG3], [0, 0, LOG2, LOG4]])
TARGETS = Targets(torch.tensor([2, 3, 0]), num_current=2)
CROSS_ENTROPY = (LOG6 + LOG2 + LOG8) / 3
SEPARATED = (LOG4 + math.log(4 / 3) + LOG2) / 3
# At T = 4 the teacher's old classes are (3/4, 1/4), the student's (1/2, 1/2).
TEACHER = Output(torch.tensor([[4 * LOG3, 0.0]] * 3))
DISTILLATION = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
METHODS = [
    *("acil", "afc", "air", "analytic", "anchored", "avcil", "bic", "derpp", "er", "finetune", "foster", "icarl"),
    *("joint", "kernel", "lwf", "memo", "ncm", "ranpac", "slda", "ssil", "wa"),
]


def method_of(name: str, step: int = 1, **options: Any) -> Method:
    method = make_method(MethodConfig.model_validate({"name": name} | options))
    method.begin_step(StepContext(SCENARIO, step))
    method.begin_training(torch.ones(4, dtype=torch.float64), 5)
    return method


def values(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("name", METHODS)
def test_step_0_trains_by_cross_entropy_over_all_classes(name: str) -> None:
    losses = method_of(name, step=0).loss(TARGETS, Output(LOGITS), None)
    assert values(losses) == pytest.approx({"loss": CROSS_ENTROPY}, rel=1e-6)


@pytest.mark.parametrize("name", ["finetune", "joint", "er"])
def test_methods_without_distillation_are_cross_entropy_in_every_step(name: str) -> None:
    losses = method_of(name).loss(TARGETS, Output(LOGITS), TEACHER)
    assert values(losses) == pytest.approx({"loss": CROSS_ENTROPY}, rel=1e-6)


def test_anchored_is_balanced_softmax_and_task_distillation() -> None:
    method = method_of("anchored", distillation_temperature=4)
    method.begin_training(torch.tensor([1.0, 2.0, 3.0, 2.0]), 5)
    losses = method.loss(TARGETS, Output(LOGITS), TEACHER)
    # Exponentials of the logits times the counts are (1, 2, 3, 6) twice, and (1, 2, 6, 8).
    balanced = (math.log(12 / 3) + math.log(12 / 6) + math.log(17 / 1)) / 3
    expected = {"balanced_softmax": balanced, "task_distillation": DISTILLATION, "loss": balanced + DISTILLATION}
    assert values(losses) == pytest.approx(expected, rel=1e-6)


def test_ssil_is_separated_softmax_and_task_distillation() -> None:
    losses = method_of("ssil", distillation_temperature=4).loss(TARGETS, Output(LOGITS), TEACHER)
    expected = {"separated_softmax": SEPARATED, "task_distillation": DISTILLATION, "loss": SEPARATED + DISTILLATION}
    assert values(losses) == pytest.approx(expected, rel=1e-6)


def test_lwf_is_cross_entropy_over_new_classes_and_task_distillation() -> None:
    targets = Targets(torch.tensor([2, 3, 2]), num_current=3)
    losses = method_of("lwf", distillation_temperature=4).loss(targets, Output(LOGITS), TEACHER)
    new = (LOG4 + math.log(4 / 3) + LOG3) / 3
    expected = {"new_classes": new, "task_distillation": DISTILLATION, "loss": new + DISTILLATION}
    assert values(losses) == pytest.approx(expected, rel=1e-6)


def test_derpp_is_cross_entropy_of_current_clips_and_two_terms_of_exemplars() -> None:
    losses = method_of("derpp", lambda_logits=0.25, lambda_labels=2.0).loss(TARGETS, Output(LOGITS), TEACHER)
    # Old logits of the exemplar are (0, 0), the teacher's (4 log 3, 0).
    expected = {"current": (LOG6 + LOG2) / 2, "logits": (4 * LOG3) ** 2 / 2, "exemplars": LOG8}
    total = expected["current"] + 0.25 * expected["logits"] + 2 * expected["exemplars"]
    assert values(losses) == pytest.approx({"loss": total} | expected, rel=1e-6)


def test_the_logits_of_the_exemplars_have_a_gradient_for_the_student_alone() -> None:
    student, teacher = LOGITS.clone().requires_grad_(), TEACHER.logits.clone().requires_grad_()
    losses = method_of("derpp").loss(TARGETS, Output(student), Output(teacher))
    losses["logits"].backward()
    assert student.grad is not None
    # d/dz of the mean of (z − z')² over the two old classes of the exemplar
    assert student.grad[2].tolist() == pytest.approx([-4 * LOG3, 0, 0, 0])
    assert not student.grad[:2].any()
    assert teacher.grad is None


def test_derpp_compares_with_the_stored_logits_that_are_known() -> None:
    is_known = torch.tensor([[False, False], [False, False], [True, False]])
    stored = StoredLogits(torch.tensor([[9.0, 9.0], [9.0, 9.0], [3.0, 0.0]]), is_known)
    method = method_of("derpp", logits="stored", lambda_logits=0.25, lambda_labels=2.0)
    losses = method.loss(replace(TARGETS, stored=stored), Output(LOGITS), None)
    assert values(losses)["logits"] == pytest.approx(3.0**2)
    total = (LOG6 + LOG2) / 2 + 0.25 * 9 + 2 * LOG8
    assert values(losses)["loss"] == pytest.approx(total)
    nothing = StoredLogits(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool))
    assert values(method.loss(replace(TARGETS, stored=nothing), Output(LOGITS), None))["logits"] == 0


def test_derpp_of_a_batch_without_exemplars_is_cross_entropy() -> None:
    targets = Targets(TARGETS.labels[:2], num_current=2)
    losses = method_of("derpp").loss(targets, Output(LOGITS[:2]), Output(TEACHER.logits[:2]))
    assert values(losses) == pytest.approx(
        {"loss": (LOG6 + LOG2) / 2, "current": (LOG6 + LOG2) / 2, "logits": 0, "exemplars": 0}
    )


@pytest.mark.parametrize("name", ["wa", "bic"])
def test_distillation_is_weighed_by_the_share_of_old_classes(name: str) -> None:
    scenario = Scenario((("a", "b"), ("c", "d"), ("e",)))
    method = make_method(MethodConfig.model_validate({"name": name, "distillation_temperature": 4}))
    for step, share in ((1, 1 / 2), (2, 4 / 5)):
        method.begin_step(StepContext(scenario, step))
        old = scenario.num_old(step)
        logits = torch.cat([LOGITS, torch.zeros(3, 1)], dim=1)[:, : scenario.num_seen(step)]
        teacher = torch.tensor([[4 * LOG3, 0, 0, 0]])[:, :old].expand(3, old)
        losses = method.loss(TARGETS, Output(logits), Output(teacher))
        cross = -torch.log_softmax(logits.double(), 1)[range(3), TARGETS.labels].mean().item()
        first, rest = 3 / (3 + old - 1), 1 / (3 + old - 1)  # the teacher's probabilities at T = 4
        student = torch.log_softmax(logits[:, :old].double() / 4, 1)
        kd = -(first * student[:, 0] + rest * student[:, 1:].sum(dim=1)).mean().item()
        expected = {"cross_entropy": cross, "distillation": kd, "loss": (1 - share) * cross + share * kd}
        assert values(losses) == pytest.approx(expected, rel=1e-6)


def test_wa_commits_rows_of_new_classes_of_the_mean_length_of_old_ones() -> None:
    head = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 12.0], [0.0, 24.0]])  # lengths 5, 1; 12, 24
    weights = {"classifier.weight": head.clone(), "classifier.bias": torch.ones(4), "audio_proj.weight": torch.eye(2)}
    committed = method_of("wa").committed_weights(weights, [])
    torch.testing.assert_close(committed["classifier.weight"], torch.cat([head[:2], head[2:] / 6]))
    assert all(committed[name] is weights[name] for name in ("classifier.bias", "audio_proj.weight"))
    assert torch.equal(weights["classifier.weight"], head)
    assert method_of("wa", step=0).committed_weights(weights, []) == weights
    assert method_of("ssil").committed_weights(weights, []) == weights


# Axes as features: at temperature 1 / log 3 a sound's own pictures weigh 3, both others 1.
AVCIL = {"contrast_temperature": 1 / LOG3, "distillation_temperature": 4, "lambda_instance": 0.5, "lambda_class": 2.0}
AVCIL_OUTPUT = Output(LOGITS, torch.eye(3), torch.eye(3), divergence=Divergence(torch.ones(1), torch.full((1,), 3.0)))
TERMS = {
    "separated_softmax": SEPARATED,
    "task_distillation": DISTILLATION,
    "instance": math.log(5 / 3),
    "class_aware": math.log(5 / 3) / 3,
    "attention": 0.25 * 1 + 0.75 * 3,
}
WEIGHTS = {"separated_softmax": 1, "task_distillation": 1, "instance": 0.5, "class_aware": 2, "attention": 1}


def test_avcil_is_the_weighted_sum_of_its_terms() -> None:
    losses = method_of("avcil", lambda_attention=0.25, **AVCIL).loss(TARGETS, AVCIL_OUTPUT, TEACHER)
    total = sum(WEIGHTS[name] * value for name, value in TERMS.items())
    assert values(losses) == pytest.approx({"loss": total} | TERMS, rel=1e-6)


def test_avcil_as_in_the_paper_divides_by_the_number_of_targets() -> None:
    losses = method_of("avcil", variant="paper", lambda_attention=0.25, **AVCIL).loss(TARGETS, AVCIL_OUTPUT, TEACHER)
    terms = TERMS | {"class_aware": math.log(5 / 3)}
    assert values(losses) == pytest.approx(
        {"loss": sum(WEIGHTS[name] * value for name, value in terms.items())} | terms, rel=1e-6
    )


@pytest.mark.parametrize("switch", ["instance", "class_aware", "attention"])
def test_a_term_of_avcil_that_is_switched_off_is_left_out(switch: str) -> None:
    method = method_of("avcil", lambda_attention=0.25, **AVCIL, **{switch: False})
    output = AVCIL_OUTPUT if switch != "attention" else AVCIL_OUTPUT._replace(divergence=None)
    terms = {name: value for name, value in TERMS.items() if name != switch}
    total = sum(WEIGHTS[name] * value for name, value in terms.items())
    assert values(method.loss(TARGETS, output, TEACHER)) == pytest.approx({"loss": total} | terms, rel=1e-6)
    assert method.needs.divergence is (switch != "attention")
    assert method.needs.both_modalities


def test_icarl_is_cross_entropy_and_distillation_of_old_logits() -> None:
    teacher = Output(torch.tensor([[2 * LOG3, 0.0]] * 3))  # probabilities 9/10 and 1/2
    # The student's old logits are 0: of their own, binary cross-entropy is log 2 whatever the target.
    losses = method_of("icarl", variant="paper").loss(TARGETS, Output(LOGITS), teacher)
    expected = {"cross_entropy": CROSS_ENTROPY, "distillation": LOG2, "loss": CROSS_ENTROPY + LOG2}
    assert values(losses) == pytest.approx(expected, rel=1e-6)
    # With the sigmoid taken twice the logits are 1/2: the mean target is 7/10.
    positive = 1 / (1 + math.exp(-0.5))
    distillation = -0.7 * math.log(positive) - 0.3 * math.log(1 - positive)
    losses = method_of("icarl").loss(TARGETS, Output(LOGITS), teacher)
    expected = {"cross_entropy": CROSS_ENTROPY, "distillation": distillation, "loss": CROSS_ENTROPY + distillation}
    assert values(losses) == pytest.approx(expected, rel=1e-6)


def test_afc_is_nca_and_a_discrepancy_that_weighs_more_with_every_step() -> None:
    sound, pictures = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 2.0]] * 3)
    student = Output(LOGITS, sound, pictures)
    turned = torch.tensor([[0.0, 3.0]] * 3)  # at a right angle to the student's sound: distance √2
    teacher = Output(TEACHER.logits, turned, pictures, importance=torch.tensor([[3.0, 1.0]] * 3))
    nca = math.log(8 * 2 * 11) / 3
    discrepancy = 0.75 * math.sqrt(2)
    for step, weight in ((1, math.sqrt(2)), (3, 2)):
        method = make_method(MethodConfig.model_validate({"name": "afc", "lambda_discrepancy": 0.4}))
        method.begin_step(StepContext(Scenario((("a",), ("b",), ("c",), ("d",))), step))
        losses = method.loss(TARGETS, student, teacher)
        expected = {"nca": nca, "discrepancy": discrepancy, "loss": nca + 0.4 * weight * discrepancy}
        assert values(losses) == pytest.approx(expected, rel=1e-6)
    importance_loss = method.importance_loss(TARGETS.labels, student)
    assert importance_loss.tolist() == pytest.approx([LOG8, LOG2, math.log(11)], rel=1e-6)


def test_the_discrepancy_of_afc_has_a_gradient_for_the_student_alone() -> None:
    student_sound, teacher_sound = (torch.tensor([row] * 3, requires_grad=True) for row in ([1.0, 0.0], [0.0, 3.0]))
    pictures = torch.ones(3, 2)
    teacher = Output(TEACHER.logits, teacher_sound, pictures, importance=torch.ones(3, 2))
    losses = method_of("afc").loss(TARGETS, Output(LOGITS, student_sound, pictures), teacher)
    losses["discrepancy"].backward()
    assert student_sound.grad is not None
    assert student_sound.grad[:, 1].abs().min() > 0
    assert teacher_sound.grad is None


def test_afc_imprints_proxies_of_the_norm_class_by_class() -> None:
    features = [torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    proxies = method_of("afc", num_proxies=2).imprint(features, norm=1.5)
    torch.testing.assert_close(proxies, torch.tensor([[1.5, 0], [1.5, 0], [0, 1.5], [0, 1.5]]))


def test_the_head_of_afc_has_as_many_proxies_as_the_method() -> None:
    assert method_of("afc", num_proxies=3).needs.network_spec == NetworkSpec(head="proxies", num_proxies=3)


def test_every_method_has_its_losses_tested() -> None:
    assert method_names() == METHODS


def test_a_context_counts_old_and_seen_classes() -> None:
    context = StepContext(Scenario((("a", "b"), ("c",), ("d", "e"))), 2)
    assert (context.num_old, context.num_seen) == (3, 5)
    assert context.old_tasks == (slice(0, 2), slice(2, 3))


def test_a_method_without_state_refuses_one() -> None:
    method = method_of("finetune")
    assert method.state_dict() == {}
    method.load_state_dict({})
    with pytest.raises(ValueError, match="Finetune has no state, but the artifact has means"):
        method.load_state_dict({"means": torch.zeros(1)})
    assert method.scores(Output(LOGITS)) is LOGITS
    for unused in (lambda: method.imprint([], 1.0), lambda: method.importance_loss(TARGETS.labels, Output(LOGITS))):
        with pytest.raises(AssertionError, match="Finetune needs"):
            unused()


@pytest.mark.parametrize("name", ["icarl", "afc"])
def test_means_predict_after_a_step_and_the_head_within_the_next(name: str) -> None:
    first = method_of(name, step=0)
    assert isinstance(first, NearestMean)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    output = Output(LOGITS, features)
    assert first.scores(output) is LOGITS
    first.end_step([torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])])
    assert first.scores(output).tolist() == [[-2, 0], [0, -2], [-2, 0]]
    # In the next step, the means of the one before select no epoch.
    second = make_method(MethodConfig(name=name))
    second.load_state_dict(first.state_dict())
    assert second.scores(output).tolist() == first.scores(output).tolist()
    second.begin_step(StepContext(SCENARIO, 1))
    assert second.context.step == 1
    assert second.scores(output) is LOGITS
    assert second.state_dict() == {}
    second.end_step(None)
    assert second.scores(output) is LOGITS
