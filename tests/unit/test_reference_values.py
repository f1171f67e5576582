"""Network and losses compared with those of the authors' released program on the same inputs."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from avcil_dist.config.schema import MethodConfig
from avcil_dist.methods import losses, make_method
from avcil_dist.methods.base import StepContext, Targets
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.heads import ProxyHead
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import make_scenario
from tests.helpers.data import DATA

VALUES = DATA / "reference_values"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Case(NamedTuple):
    facts: dict
    tensors: dict[str, Tensor]
    student: AudioVisualNetwork
    teacher: AudioVisualNetwork
    visual: Tensor
    audio: Tensor
    output: Output

    @property
    def context(self) -> StepContext:
        """The last step of the reference's scenario."""
        sizes = self.facts["classes_per_task"]
        scenario = make_scenario([str(label) for label in range(sum(sizes))], classes_per_step=sizes)
        return StepContext(scenario, scenario.num_steps - 1)

    def loss_of(self, method: str, output: Output, teacher: Output, labels: Tensor) -> Tensor:
        """The total of a method on the whole batch."""
        made = make_method(MethodConfig(name=method))
        made.begin_step(self.context)
        return made.loss(Targets(labels, self.facts["current"]), output, teacher)["loss"]

    @property
    def total(self) -> dict[str, Tensor]:
        """Every term by the reference's name."""
        facts, labels, output = self.facts, self.tensors["labels"], self.output
        scenario, last = self.context.scenario, self.context.step
        temperature = facts["contrastive_temperature"]
        features = (output.audio, output.visual)
        terms = {
            "ce_all": losses.cross_entropy(output.logits, labels),
            "separated_softmax": losses.separated_softmax(
                output.logits, labels, facts["current"], scenario.num_old(last)
            ),
            "task_kd": losses.task_distillation(
                output.logits, self.tensors["teacher_logits"], scenario.head_slices(last)[:-1], facts["kd_temperature"]
            ),
            "instance": losses.instance_contrast(*features, temperature),
            "class_released": losses.class_contrast(*features, labels, temperature, "released"),
            "class_paper": losses.class_contrast(*features, labels, temperature, "paper"),
            "attention_spatial": losses.attention_distillation(output.divergence, 1.0),
            "attention_temporal": losses.attention_distillation(output.divergence, 0.0),
        }
        terms["avcil_total_released"] = (
            terms["separated_softmax"]
            + terms["task_kd"]
            + facts["lambda_instance"] * terms["instance"]
            + facts["lambda_class"] * terms["class_released"]
            + losses.attention_distillation(output.divergence, facts["lambda_attention"])
        )
        teacher_output = Output(self.tensors["teacher_logits"], None, None)
        num_old = scenario.num_old(last)
        new_labels = num_old + labels % facts["classes_per_task"][last]  # as the reference labels its batch for this
        terms["icarl_released"] = self.loss_of("icarl", output, teacher_output, labels)
        terms["ssil_total"] = self.loss_of("ssil", output, teacher_output, labels)
        terms["lwf_total"] = self.loss_of("lwf", output, teacher_output, new_labels)
        return terms

    @property
    def afc(self) -> tuple[Output, Output]:
        """Student and teacher with the head of proxies, the teacher's output with its importance."""
        num_old = self.context.num_old
        proxies = torch.cat([self.tensors["afc.proxies_old"], self.tensors["afc.proxies_new"]])
        method = make_method(MethodConfig(name="afc"))
        outputs = []
        for module in (self.student, self.teacher):
            head = ProxyHead(proxies.shape[1], self.context.num_seen, num_old, num_proxies=10)
            head.load_state_dict({"frozen": proxies[: 10 * num_old], "proxies": proxies[10 * num_old :]})
            module.classifier = head
            outputs.append(module(self.visual, self.audio))
        student, teacher = outputs
        traced = self.teacher.trace_head(teacher)
        loss = method.importance_loss(self.tensors["labels"], traced).sum()
        norms = [gradient.norm(dim=1) for gradient in torch.autograd.grad(loss, traced.features())]
        return student, teacher._replace(importance=torch.stack(norms, dim=1))


def reference_name(name: str) -> str:
    return name.replace("attention.attn_audio", "attn_audio_proj").replace("attention.attn_visual", "attn_visual_proj")


def network(tensors: dict[str, Tensor], who: str) -> AudioVisualNetwork:
    num_classes, dim = tensors[f"{who}.classifier.weight"].shape
    made = AudioVisualNetwork(Precomputed(dim), Precomputed(dim), num_classes)
    made.load_state_dict({name: tensors[f"{who}.{reference_name(name)}"] for name in made.state_dict()})
    return made


@pytest.fixture(params=["a", "b", "c"])
def case(request: pytest.FixtureRequest) -> Case:
    facts = json.loads((VALUES / f"case_{request.param}.json").read_text())
    with np.load(VALUES / f"case_{request.param}.npz", allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    student, teacher = network(tensors, "student"), network(tensors, "teacher")
    visual = tensors["visual"].unflatten(1, (facts["frames"], facts["positions"]))
    view = teacher.attention_view(visual[facts["current"] :], tensors["audio"][facts["current"] :])[0]
    output = student(visual, tensors["audio"], view)
    return Case(facts, tensors, student, teacher, visual, tensors["audio"], output)


def test_logits_agree(case: Case) -> None:
    torch.testing.assert_close(case.output.logits, case.tensors["logits"], **TOLERANCE)
    teacher_logits = case.teacher(case.visual, case.audio).logits
    torch.testing.assert_close(teacher_logits, case.tensors["teacher_logits"], **TOLERANCE)


def test_features_agree(case: Case) -> None:
    for name in ("audio", "visual"):
        unit = torch.nn.functional.normalize(getattr(case.output, name), dim=1)
        torch.testing.assert_close(unit, case.tensors[f"{name}_feature_unit"], **TOLERANCE)


def test_attention_maps_agree(case: Case) -> None:
    for module, prefix in ((case.student, ""), (case.teacher, "teacher_")):
        spatial, temporal = module.attention.maps(case.audio, case.visual)
        torch.testing.assert_close(spatial, case.tensors[f"{prefix}spatial_attention"], **TOLERANCE)
        torch.testing.assert_close(temporal, case.tensors[f"{prefix}temporal_attention"], **TOLERANCE)


def test_every_loss_term_agrees(case: Case) -> None:
    terms = case.total
    assert terms.keys() <= case.facts["losses"].keys()
    ours = {name: term.item() for name, term in terms.items()}
    theirs = {name: case.facts["losses"][name] for name in terms}
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_afc_logits_agree(case: Case) -> None:
    student, teacher = case.afc
    torch.testing.assert_close(student.logits, case.tensors["afc.student_logits"], **TOLERANCE)
    torch.testing.assert_close(teacher.logits, case.tensors["afc.teacher_logits"], **TOLERANCE)


def test_afc_importance_agrees(case: Case) -> None:
    importance = case.afc[1].importance
    shares = importance / importance.sum(dim=1, keepdim=True)
    for column, name in enumerate(("pooled", "audio", "visual")):
        torch.testing.assert_close(shares[:, column], case.tensors[f"afc.importance_{name}"], **TOLERANCE)


def test_afc_losses_agree(case: Case) -> None:
    student, teacher = case.afc
    labels, theirs = case.tensors["labels"], case.facts["losses"]
    nca = losses.proxy_nca(student.logits, labels).mean()
    discrepancy = losses.feature_discrepancy(student.features(), teacher.features(), teacher.importance)
    total = case.loss_of("afc", student, teacher, labels)
    ours = {"afc_nca": nca.item(), "afc_discrepancy": discrepancy.item(), "afc_total": total.item()}
    assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-5, abs=1e-5)


def test_every_loss_of_the_reference_is_compared(case: Case) -> None:
    assert {*case.total, "afc_nca", "afc_discrepancy", "afc_total"} == {*case.facts["losses"]}


def test_gradients_of_the_total_agree(case: Case) -> None:
    case.total["avcil_total_released"].backward()
    parameters = dict(case.student.named_parameters())
    assert {f"grad_total.{reference_name(name)}" for name in parameters} == {
        name for name in case.tensors if name.startswith("grad_total.")
    }
    for name, parameter in parameters.items():
        theirs = case.tensors[f"grad_total.{reference_name(name)}"]
        torch.testing.assert_close(parameter.grad, theirs, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert all(parameter.grad is None for parameter in case.teacher.parameters())
