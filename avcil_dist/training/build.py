"""Networks of a step: the student with its grown head, the teacher, and a network from a stored state."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from avcil_dist.config.schema import Config
from avcil_dist.errors import DataError
from avcil_dist.methods.base import Method
from avcil_dist.models.encoders.base import Encoder
from avcil_dist.models.heads import ProxyHead
from avcil_dist.models.network import AudioVisualNetwork, HeadedNetwork, Network, build_network
from avcil_dist.models.state_dict import load_whole_state
from avcil_dist.scenario import Scenario
from avcil_dist.seeds import derive_seed
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import step_url
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.teacher import Teacher


def network_after(
    config: Config,
    feature_shape: Mapping[str, int],
    scenario: Scenario,
    method: Method,
    step: int,
    state_keys: Collection[str] | None = None,
) -> Network:
    """Return a network with the shape that it has at the end of `step`.

    `feature_shape` is the manifest's: frames, positions and dim of features, empty for clips. The weights are
    initialised, or left to the caller, who loads a state with the names `state_keys`.
    """
    needs = method.needs
    trained = 0 if needs.training == "first step" else step
    network = build_network(
        config.model,
        config.data.clip,
        feature_shape,
        scenario.num_seen(trained),
        network_spec=needs.network_spec,
        num_frozen=scenario.num_old(trained),
        num_earlier=trained,
        state_keys=state_keys,
    )
    network.precision = config.engine.precision
    if isinstance(network, AudioVisualNetwork):
        network.attention.choice = config.engine.attention
    return network


def network_of_state(step: Step, state: Mapping[str, Tensor]) -> Network:
    """Return a network with the weights at the end of `step`, on its device."""
    network = _network(step, step.number, state.keys())
    load_whole_state(network, state, f"step {step.number}, as trained")
    return network.to(step.device)


def build_networks(
    step: Step, previous: StepArtifact | None, inference: InferencePass
) -> tuple[Network, Teacher | None]:
    """Return the student with its grown head, and the teacher if the method needs one.

    Initial weights depend on the seed and the step's number alone.
    """
    torch.manual_seed(derive_seed(step.config.seed, "weights", step.number))
    if previous is None:
        return _prepared(step, _network(step, step.number)), None
    teacher = Teacher(_previous_network(step, previous), step.device) if step.needs.teacher else None
    if step.needs.fresh_network:
        student = _network(step, step.number)
    else:
        student = _previous_network(step, previous)
        if step.has_training:
            _grow(step, student, teacher, inference)
    if teacher and step.config.engine.teacher == "sharded":
        teacher.shard(step.world)
    return _prepared(step, student), teacher


def _network(step: Step, number: int, state_keys: Collection[str] | None = None) -> Network:
    return network_after(step.config, step.manifest.shape, step.scenario, step.method, number, state_keys)


def _previous_network(step: Step, previous: StepArtifact) -> Network:
    """The network that the previous step committed."""
    network = _network(step, previous.step, previous.model.keys())
    load_whole_state(network, previous.model, step_url(stream_url(step.config), previous.step))
    return network


def _prepared(step: Step, student: Network) -> Network:
    """The student on its device, with activation checkpointing where it is on."""
    if step.config.engine.activation_checkpointing:
        for module in student.modules():
            if isinstance(module, Encoder):
                module.checkpoint_activations()
    return student.to(step.device)


def _grow(step: Step, student: Network, teacher: Teacher | None, inference: InferencePass) -> None:
    """Add outputs for the new classes to the student's head, and to the teacher's where its importance is needed."""
    assert isinstance(student, HeadedNetwork)
    new = _new_proxies(step, student, inference) if step.needs.network_spec.head == "proxies" else None
    student.grow(step.context.num_seen, new)
    if teacher and step.needs.importance:
        teacher.grow(step.context.num_seen, new)


def _new_proxies(step: Step, student: HeadedNetwork, inference: InferencePass) -> Tensor:
    """Proxies of the new classes, from the features that the student has of their clips before training."""
    clips = {name: step.manifest.clips([name], "train") for name in step.new_classes}
    by_class = inference.class_features(student.to(step.device), clips)
    for name in step.new_classes:
        if not len(by_class[name].features):
            raise DataError(f"class {name!r}: none of its training clips can be read; restore its shards")
    assert isinstance(student.classifier, ProxyHead)
    return step.method.imprint([by_class[name].features for name in step.new_classes], student.classifier.mean_norm)
