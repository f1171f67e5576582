"""An incremental step on one rank, as a value: everything that is fixed before the step begins."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from avcil_dist.config.schema import Config
from avcil_dist.data.arrival import late_clips
from avcil_dist.data.clip_cache import ClipCache
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.manifest import Manifest
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, Needs, StepContext
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.scenario import Scenario
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import step_url
from avcil_dist.training.inference_pass import InferencePass, OnFaults
from avcil_dist.world import World


@dataclass(frozen=True)
class Step:
    """Settings, data, method, rank and device of an incremental step. `number` counts from 0.

    `manifest` has the training clips that have arrived by this step. `method` is the only member with a state that
    changes during the step.
    """

    config: Config
    manifest: Manifest
    scenario: Scenario
    number: int
    method: Method
    world: World
    device: torch.device

    @property
    def context(self) -> StepContext:
        """The step's position in the class stream."""
        return StepContext(self.scenario, self.number)

    @property
    def needs(self) -> Needs:
        """The method's needs."""
        return self.method.needs

    @property
    def has_training(self) -> bool:
        """Whether the network is trained by gradients at this step."""
        return self.needs.trains_at(self.number)

    @property
    def new_classes(self) -> tuple[str, ...]:
        """The classes that arrive at this step."""
        return self.scenario.new(self.number)

    @cached_property
    def late_clips(self) -> np.ndarray:
        """Training clips of old classes that arrive at this step."""
        return late_clips(self.manifest, self.scenario, self.config.scenario, self.number)

    @property
    def current_clips(self) -> np.ndarray:
        """All training clips that arrive at this step."""
        return np.concatenate([self.manifest.clips(self.new_classes, "train"), self.late_clips])

    @property
    def seen_classes(self) -> tuple[str, ...]:
        """The classes of this and all earlier steps, in label order."""
        return self.scenario.seen(self.number)

    @property
    def inputs(self) -> ClipInputs:
        """Preparation of clips for the encoders."""
        return clip_inputs(self.config.model, self.config.data.clip)

    def inference(
        self, clip_cache: ClipCache | None = None, on_faults: OnFaults = lambda faults: None
    ) -> InferencePass:
        """Inference passes over the step's data, which read from `clip_cache` where they can."""
        return InferencePass(
            self.manifest,
            self.scenario,
            self.config.data,
            self.world,
            self.device,
            clip_cache,
            self.inputs,
            on_faults=on_faults,
        )


def make_step(
    config: Config,
    manifest: Manifest,
    scenario: Scenario,
    number: int,
    previous: StepArtifact | None,
    *,
    world: World,
    device: torch.device,
) -> Step:
    """Make a step; its method continues from the state in `previous`, the artifact of the step before."""
    method = make_method(config.method)
    if previous:
        source = step_url(stream_url(config), previous.step)
        method.restore(previous.method, previous.scenario.num_seen(previous.step), source)
    step = Step(config, manifest, scenario, number, method, world, device)
    method.begin_step(step.context)
    return step
