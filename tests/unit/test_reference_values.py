"""The network and the losses against what the authors' released program computes on the same inputs."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from avcil_dist.methods import losses
from avcil_dist.models.encoders import Precomputed
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import make_scenario

VALUES = Path(__file__).parents[2].parent / "shared" / "data" / "reference_values"
pytestmark = pytest.mark.skipif(not VALUES.is_dir(), reason=f"reference values are not at {VALUES}")
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
    def total(self) -> dict[str, Tensor]:
        """Every term by the reference's name."""
        facts, labels, output = self.facts, self.tensors["labels"], self.output
        sizes = facts["classes_per_task"]
        scenario = make_scenario([str(label) for label in range(sum(sizes))], steps=sizes)
        last = scenario.num_steps - 1
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
        return terms


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
    view = teacher.view(visual, tensors["audio"], slice(facts["current"], None))
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
