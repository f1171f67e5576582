"""Inference from a committed step: its network and method, class scores of new clips, accuracies on a data set."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from avcil_dist import storage
from avcil_dist.data.manifest import Manifest, Split, check_shards, load_manifest
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ArtifactError, ConfigError, DataError
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.models.network import Network, load_whole_state
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from avcil_dist.streams.compat import check_manifest_scenario
from avcil_dist.streams.metrics import accuracy_row, per_class_accuracy, seen_accuracy
from avcil_dist.streams.summary import committed_steps, step_url
from avcil_dist.training.build import network_after
from avcil_dist.training.collectives import process_group
from avcil_dist.training.device import DeviceSetting, local_device
from avcil_dist.training.engine import set_threads
from avcil_dist.training.evaluation import DAMAGED, Predictions, evaluate
from avcil_dist.training.incremental_step import Step
from avcil_dist.world import World

CLIPS_PER_BATCH = 8
Modality = Literal["audio", "visual"]


def restore_step(
    artifact: StepArtifact, feature_shape: Mapping[str, int], source: str, missing: Modality | None = None
) -> tuple[Network, Method]:
    """Return the network and the method of a step, from its artifact alone: no encoder downloads weights.

    `feature_shape` is as for `network_after`. Without the modality `missing` the network ignores its input, and the
    method predicts from the other one. Raises ArtifactError, naming `source`, for weights that do not fit; ConfigError
    where the method cannot predict without `missing`.
    """
    method = make_method(artifact.config.method)
    method.begin_step(StepContext(artifact.scenario, artifact.step))
    method.restore(artifact.method, artifact.scenario.num_seen(artifact.step), source)
    network = network_after(
        artifact.config, feature_shape, artifact.scenario, method, artifact.step, artifact.model.keys()
    )
    load_whole_state(network, artifact.model, source)
    if missing is not None:
        _remove_modality(network, method, artifact, missing)
    return network, method


def _remove_modality(network: Network, method: Method, artifact: StepArtifact, missing: Modality) -> None:
    """Remove an encoder, so that outputs of the network lack its modality."""
    model, name = artifact.config.model, artifact.config.method.name
    if model.modality != "both":
        raise ConfigError(f"the step was trained on {model.modality} alone; nothing can be missing")
    if not method.takes_one_modality:
        raise ConfigError(
            f"method {name}, with these options, has no head for one modality; those from sums over tokens have "
            f"(method=analytic), or train on the other one alone (model.modality)"
        )
    if missing == "visual":
        network.visual_encoder = None
    else:
        network.audio_encoder = None


class Predictor:
    """Class scores of clips by the weights of a committed step, on a GPU where there is one.

    `classes` are the seen classes, in the order of the scores' columns. `takes_features` selects one of the two
    methods: a step trained on features scores features, a step trained on clips scores clips. Without the modality
    `missing` its input is ignored.
    """

    def __init__(
        self, artifact: StepArtifact, feature_shape: Mapping[str, int], source: str, missing: Modality | None = None
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, self.method = restore_step(artifact, feature_shape, source, missing)
        self.network = network.to(self.device).eval()
        self.inputs = clip_inputs(artifact.config.model, artifact.config.data.clip)
        self.takes_features = artifact.config.model.visual.kind == "precomputed"
        self.classes = list(artifact.scenario.seen(artifact.step))

    def score_features(self, visual: Tensor, audio: Tensor) -> Tensor:
        """Scores (clips, classes) of features: `visual` (clips, frames, positions, dim), `audio` (clips, dim)."""
        pairs = zip(visual.split(CLIPS_PER_BATCH), audio.split(CLIPS_PER_BATCH), strict=True)
        return self._joined(self._scores(*pair) for pair in pairs)

    def score_clips(self, clips: Iterable[tuple[str, bytes]]) -> Tensor:
        """Scores (clips, classes) of video files, each given as its name in errors and its bytes.

        Raises DataError for a clip that cannot be decoded.
        """
        return self._joined(self._scores(*self._decoded(batch)) for batch in _batches(clips))

    @torch.inference_mode()
    def _scores(self, visual: Tensor, audio: Tensor) -> Tensor:
        return self.method.scores(self.network(visual.to(self.device), audio.to(self.device)))

    def _joined(self, scores: Iterable[Tensor]) -> Tensor:
        rows = [batch.cpu() for batch in scores]
        return torch.cat(rows) if rows else torch.zeros(0, len(self.classes))

    def _decoded(self, clips: list[tuple[str, bytes]]) -> tuple[Tensor, Tensor]:
        transform = ClipTransform(self.inputs)
        pairs = [transform.decode(data, where=name) for name, data in clips]
        return torch.stack([visual for visual, _ in pairs]), torch.stack([audio for _, audio in pairs])


@dataclass(frozen=True)
class StepPredictions:
    """Predictions of every clip of a split by the weights of a committed step."""

    artifact: StepArtifact
    manifest: Manifest
    predicted: Predictions

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Key, class and predicted class of each clip, in the manifest's order; "" for a damaged clip."""
        names = self.artifact.scenario.seen(self.artifact.step)
        for clip, label, prediction in zip(
            self.predicted.clips.tolist(),
            self.predicted.labels.tolist(),
            self.predicted.predictions.tolist(),
            strict=True,
        ):
            yield self.manifest.key(clip), names[label], "" if prediction == DAMAGED else names[prediction]


def predict_step(
    stream: str,
    step: int | None,
    split: Split,
    manifest_url: str | None,
    *,
    world: World,
    missing: Modality | None = None,
    device_setting: DeviceSetting = "auto",
) -> StepPredictions:
    """Predict every clip of a split with the weights of a committed step.

    `step` is the last committed one by default, `manifest_url` the manifest that the step was trained on. Without the
    modality `missing` the other one predicts. All ranks of `world` call it; `device_setting` is as engine.device.
    Raises ArtifactError when the stream has no such step, DataError for missing shards and for a task without clips of
    the split, ConfigError where the method cannot predict without `missing`.
    """
    artifact = load_artifact(stream, _last_step(stream) if step is None else step)
    config, scenario = artifact.config, artifact.scenario
    manifest_url = manifest_url or config.data.manifest
    manifest = load_manifest(manifest_url)
    check_manifest_scenario(stream, artifact, manifest)
    for task in range(artifact.step + 1):
        if not len(manifest.clips(scenario.new(task), split)):
            raise DataError(
                f"{manifest_url}: no {split} clips of the {len(scenario.new(task))} classes of step {task} "
                f"({', '.join(scenario.new(task)[:3])}, …); choose another --split or --manifest"
            )
    check_shards(manifest, manifest.shard_numbers(scenario.seen(artifact.step), split))
    device = local_device(world, device_setting)
    set_threads(world)
    with process_group(world, device, config.engine):
        network, method = restore_step(artifact, manifest.shape, step_url(stream, artifact.step), missing)
        restored = Step(config, manifest, scenario, artifact.step, method, world, device)
        predicted = evaluate(restored, network.to(device), split, restored.inference())
    return StepPredictions(artifact, manifest, predicted)


def evaluate_step(
    stream: str,
    step: int | None,
    split: Split,
    manifest_url: str | None,
    *,
    world: World,
    missing: Modality | None = None,
    device_setting: DeviceSetting = "auto",
) -> dict[str, Any]:
    """Return the accuracies of `predict_step` over the step's seen classes. Arguments and errors are its."""
    made = predict_step(stream, step, split, manifest_url, world=world, missing=missing, device_setting=device_setting)
    scenario, number = made.artifact.scenario, made.artifact.step
    labels, predictions = made.predicted.labels, made.predicted.predictions
    return {
        "stream": stream,
        "step": number,
        "split": split,
        "missing": missing,
        "num_clips": len(labels),
        "seen_accuracy": seen_accuracy(labels, predictions),
        "task_accuracy": accuracy_row(labels, predictions, scenario.head_slices(number)),
        "per_class": per_class_accuracy(labels, predictions, scenario.seen(number)),
    }


def _last_step(stream: str) -> int:
    steps = committed_steps(stream)
    if not steps:
        raise ArtifactError(f"{storage.join(stream, 'step_000')}: no committed step artifact; train the stream first")
    return steps[-1]


def _batches(clips: Iterable[tuple[str, bytes]]) -> Iterable[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    for clip in clips:
        batch.append(clip)
        if len(batch) == CLIPS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
