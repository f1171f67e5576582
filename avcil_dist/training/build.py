"""The networks of a step: the shape that a method's network has at each step, the student and the teacher."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import Manifest
from avcil_dist.errors import DataError
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.encoders.base import Encoder
from avcil_dist.models.heads import ProxyHead
from avcil_dist.models.network import AudioVisualNetwork, HeadedNetwork, Network, build_network, load_whole_state
from avcil_dist.scenario import Scenario
from avcil_dist.seeds import derive_seed
from avcil_dist.streams.artifact import StepArtifact, step_url
from avcil_dist.streams.stream import stream_url
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.teacher import Teacher


def network_after(
    config: Config,
    feature_shape: Mapping[str, int],
    scenario: Scenario,
    method: Method,
    step: int,
    restored: Collection[str] | None = None,
) -> Network:
    """A network with the shape that it has at the end of `step`.

    `feature_shape` is the manifest's: frames, positions and dim of features, empty for clips. The weights are
    fresh, or for the caller to put in: `restored` are the names of that state.
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
        state_keys=restored,
    )
    network.precision = config.engine.precision
    if isinstance(network, AudioVisualNetwork):
        network.attention.choice = config.engine.attention
    return network


@dataclass(frozen=True)
class NetworkMaker:
    """Makes the networks of one step."""

    config: Config
    manifest: Manifest
    context: StepContext
    method: Method
    features: InferencePass
    device: torch.device

    def make(self, previous: StepArtifact | None) -> tuple[Network, Teacher | None]:
        """The student, its head grown, and the teacher where the method has one."""
        needs, step = self.method.needs, self.context.step
        torch.manual_seed(derive_seed(self.config.seed, "weights", step))
        if previous is None:
            return self._ready(self._after(step)), None
        teacher = Teacher(self._as_it_was(previous), self.device) if needs.teacher else None
        if needs.fresh_network:
            student = self._after(step)
        else:
            student = self._as_it_was(previous)
            if needs.trains_at(step):
                self._grow(student, teacher)
        if teacher and self.config.engine.teacher == "sharded":
            teacher.shard(self.features.world)
        return self._ready(student), teacher

    def _ready(self, student: Network) -> Network:
        if self.config.engine.activation_checkpointing:
            for module in student.modules():
                if isinstance(module, Encoder):
                    module.checkpoint_activations()
        return student.to(self.device)

    def _after(self, step: int, origin: StepArtifact | None = None) -> Network:
        restored = origin.model.keys() if origin else None
        return network_after(self.config, self.manifest.shape, self.context.scenario, self.method, step, restored)

    def _as_it_was(self, previous: StepArtifact) -> Network:
        network = self._after(previous.step, previous)
        load_whole_state(network, previous.model, step_url(stream_url(self.config), previous.step))
        return network

    def _grow(self, student: Network, teacher: Teacher | None) -> None:
        assert isinstance(student, HeadedNetwork)
        new = self._new_proxies(student) if self.method.needs.network_spec.head == "proxies" else None
        student.grow(self.context.num_seen, new)
        if teacher and self.method.needs.importance:
            teacher.grow(self.context.num_seen, new)

    def _new_proxies(self, student: HeadedNetwork) -> Tensor:
        """Proxies of the new classes, from what the student makes of their clips before it has learnt them."""
        names = self.context.scenario.new(self.context.step)
        found = self.features.class_features(
            student.to(self.device), {name: self.manifest.clips([name], "train") for name in names}
        )
        for name in names:
            if not len(found[name].features):
                raise DataError(f"class {name!r}: none of its training clips can be read; restore its shards")
        assert isinstance(student.classifier, ProxyHead)
        return self.method.imprint([found[name].features for name in names], student.classifier.mean_norm)
