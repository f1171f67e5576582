"""Predictions of every clip of a data set by the weights of a committed step, by all ranks together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from avcil_dist.data.manifest import Manifest, check_shards
from avcil_dist.data.noise import InputNoise
from avcil_dist.data.shard import Split
from avcil_dist.data.source_videos import source_of
from avcil_dist.errors import ArtifactError, DataError
from avcil_dist.inference.predict import Modality, restore_step
from avcil_dist.models.network import Network
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from avcil_dist.streams.commit import has_commit
from avcil_dist.streams.compat import check_manifest_scenario
from avcil_dist.streams.step_data import data_of_step
from avcil_dist.streams.summary import committed_steps, step_url
from avcil_dist.training.collectives import process_group
from avcil_dist.training.device import DeviceSetting, local_device
from avcil_dist.training.engine import set_threads
from avcil_dist.training.evaluation import ScoredPredictions, evaluate_scores
from avcil_dist.training.incremental_step import Step
from avcil_dist.world import World


@dataclass(frozen=True)
class Condition:
    """Input that the network gets: that of both modalities or of one, and noise in it."""

    modality: Modality | None = None
    noise: InputNoise | None = None


PLAIN = Condition()


@dataclass(frozen=True)
class StepRequest:
    """A step of a stream, and the clips that it is to predict.

    `step` is the last committed one by default, `manifest` the url of the one that the step was trained on; `device`
    is as engine.device.
    """

    stream: str
    step: int | None = None
    split: Split = "test"
    manifest: str | None = None
    condition: Condition = PLAIN
    device: DeviceSetting = "auto"


@dataclass(frozen=True)
class StepPredictions:
    """Predictions of every clip of the request's split, with scores; all metrics are functions of this."""

    request: StepRequest
    artifact: StepArtifact
    manifest: Manifest
    predicted: ScoredPredictions

    @cached_property
    def keys(self) -> list[str]:
        """Key of each clip."""
        return [self.manifest.key(clip) for clip in self.predicted.clips.tolist()]

    @cached_property
    def sources(self) -> list[str]:
        """Source video of each clip."""
        return [source_of(key) for key in self.keys]

    @property
    def classes(self) -> tuple[str, ...]:
        """The seen classes, in the order of the scores' columns."""
        return self.artifact.scenario.seen(self.artifact.step)

    @property
    def tasks(self) -> tuple[slice, ...]:
        """The columns of each step's classes."""
        return self.artifact.scenario.head_slices(self.artifact.step)

    @property
    def correct(self) -> np.ndarray:
        """Whether each clip is predicted correctly."""
        return self.predicted.labels == self.predicted.predictions


def predict_step(request: StepRequest, world: World) -> StepPredictions:
    """Predict every clip of a split of the seen classes. All ranks of `world` call it, and return the same.

    Raises ArtifactError when the stream has no such step, DataError for missing shards and for a task without clips of
    the split, ConfigError for a condition that the step's model cannot meet.
    """
    artifact, manifest = loaded(request)
    with restored(request, artifact, manifest, world) as (step, network):
        inference = replace(step.inference(), noise=request.condition.noise)
        predicted = evaluate_scores(step, network, request.split, inference)
    return StepPredictions(request, artifact, manifest, predicted)


@contextmanager
def restored(
    request: StepRequest, artifact: StepArtifact, manifest: Manifest, world: World
) -> Iterator[tuple[Step, Network]]:
    """Yield the step of an artifact with its network on this rank's device, within a process group."""
    config = artifact.config
    device = local_device(world, request.device)
    set_threads(world)
    with process_group(world, device, config.engine):
        source = step_url(request.stream, artifact.step)
        network, method = restore_step(artifact, manifest.shape, source, request.condition.modality)
        step = Step(config, manifest, artifact.scenario, artifact.step, method, world, device)
        yield step, network.to(device)


def last_step(stream: str) -> int:
    """Return the last committed step. Raises ArtifactError when there is none."""
    steps = committed_steps(stream)
    if not steps:
        of_step = "; that is the folder of a step" * has_commit(stream)
        raise ArtifactError(
            f"{stream}: no committed step (searched for step_*/COMMITTED.json there){of_step}; give the folder of a "
            "stream, such as runs/demo-avcil-seed0"
        )
    return steps[-1]


def loaded(request: StepRequest) -> tuple[StepArtifact, Manifest]:
    """Return the step and its manifest. Raises as `predict_step` does where there is nothing to predict."""
    stream, split = request.stream, request.split
    last = last_step(stream)
    artifact = load_artifact(stream, last if request.step is None else request.step)
    scenario = artifact.scenario
    url = request.manifest or artifact.config.data.manifest
    manifest = data_of_step(artifact, request.manifest)
    check_manifest_scenario(stream, artifact, manifest)
    for task in range(artifact.step + 1):
        if not len(manifest.clips(scenario.new(task), split)):
            raise DataError(
                f"{url}: no {split} clips of the {len(scenario.new(task))} classes of step {task} "
                f"({', '.join(scenario.new(task)[:3])}, …); choose another --split or --manifest"
            )
    check_shards(manifest, manifest.shard_numbers(scenario.seen(artifact.step), split))
    return artifact, manifest
