"""Inference from a committed step: its network and method, and class scores of new clips."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from avcil_dist.data.manifest import EncoderRecord
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.encoders.base import Encoder
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.models.network import Network
from avcil_dist.models.state_dict import load_whole_state
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.training.build import network_after

CLIPS_PER_BATCH = 8
Modality = Literal["audio", "visual"]


@dataclass(frozen=True)
class StoredModel:
    """A committed step of a stream's folder or of a registered model, and the record of its inputs.

    `shape` and `encoders` are those of its features. Errors name the step by `source`, and by `recorded_in` the file or
    model that has the record of the encoders. `num_clips` are the clips of the seen classes by split, for a stream.
    """

    artifact: StepArtifact
    shape: Mapping[str, int]
    encoders: EncoderRecord | None
    source: str
    recorded_in: str
    num_clips: Mapping[str, int] = field(default_factory=dict)


def restore_step(
    artifact: StepArtifact, feature_shape: Mapping[str, int], source: str, modality: Modality | None = None
) -> tuple[Network, Method]:
    """Return the network and the method of a step, from its artifact alone: no encoder downloads weights.

    `feature_shape` is as for `network_after`. With a `modality` the other one is removed, as `remove_modality`
    describes. Raises ArtifactError, naming `source`, for weights that do not fit; ConfigError for a step that was
    trained on one modality.
    """
    method = make_method(artifact.config.method)
    method.begin_step(StepContext(artifact.scenario, artifact.step))
    method.restore(artifact.method, artifact.scenario.num_seen(artifact.step), source)
    network = network_after(
        artifact.config, feature_shape, artifact.scenario, method, artifact.step, artifact.model.keys()
    )
    load_whole_state(network, artifact.model, source)
    if modality is not None:
        if artifact.config.model.modality != "both":
            raise ConfigError(f"the step was trained on {artifact.config.model.modality} alone; nothing can be removed")
        remove_modality(network, method, modality)
    return network, method


def remove_modality(network: Network, method: Method, kept: Modality) -> None:
    """Make a network and its method predict from the modality `kept` alone.

    A method with a head for one modality gets outputs without the other. Any other gets zeros as the other's input:
    zero features, or the mean colour and the mean of the filterbank, which normalised inputs have.
    """
    if kept == "audio":
        network.visual_encoder = _without_input(network.visual_encoder, method)
    else:
        network.audio_encoder = _without_input(network.audio_encoder, method)


def _without_input(encoder: Encoder | None, method: Method) -> Encoder | None:
    return None if encoder is None or method.takes_one_modality else _ZeroInput(encoder)


class _ZeroInput(Encoder):
    """Encoder that reads zeros instead of its input."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.dim)
        self.encoder = encoder

    def forward(self, inputs: Tensor) -> Tensor:
        """Encode zeros of the shape of `inputs`."""
        encoded: Tensor = self.encoder(torch.zeros_like(inputs))
        return encoded


class Predictor:
    """Class scores of clips by the weights of a committed step, on a GPU where there is one.

    `classes` are the seen classes, in the order of the scores' columns. `takes_features` selects one of the two
    methods: a step trained on features scores features, a step trained on clips scores clips. With a `modality` the
    input of the other one is ignored.
    """

    def __init__(
        self,
        artifact: StepArtifact,
        feature_shape: Mapping[str, int],
        source: str,
        modality: Modality | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, self.method = restore_step(artifact, feature_shape, source, modality)
        self.network = network.to(self.device).eval()
        self.inputs = clip_inputs(artifact.config.model, artifact.config.data.clip)
        self.takes_features = artifact.config.model.visual.kind == "precomputed"
        self.classes = list(artifact.scenario.seen(artifact.step))

    def score_features(self, visual: Tensor, audio: Tensor) -> Tensor:
        """Scores (clips, classes) of features: `visual` (clips, frames, positions, dim), `audio` (clips, dim)."""
        pairs = zip(visual.split(CLIPS_PER_BATCH), audio.split(CLIPS_PER_BATCH), strict=True)
        return self._joined(self.score(*pair) for pair in pairs)

    def score_clips(self, clips: Iterable[tuple[str, bytes]]) -> Tensor:
        """Scores (clips, classes) of video files, each given as its name in errors and its bytes.

        Raises DataError for a clip that cannot be decoded.
        """
        return self._joined(self.score(*self._decoded(batch)) for batch in _batches(clips))

    @torch.inference_mode()
    def score(self, visual: Tensor, audio: Tensor) -> Tensor:
        """Scores (B, classes), on the device, of a batch of prepared clips, or of features."""
        return self.method.scores(self.network(visual.to(self.device), audio.to(self.device)))

    def _joined(self, scores: Iterable[Tensor]) -> Tensor:
        rows = [batch.cpu() for batch in scores]
        return torch.cat(rows) if rows else torch.zeros(0, len(self.classes))

    def _decoded(self, clips: list[tuple[str, bytes]]) -> tuple[Tensor, Tensor]:
        transform = ClipTransform(self.inputs)
        pairs = [transform.decode(data, where=name) for name, data in clips]
        return torch.stack([visual for visual, _ in pairs]), torch.stack([audio for _, audio in pairs])


def _batches(clips: Iterable[tuple[str, bytes]]) -> Iterable[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    for clip in clips:
        batch.append(clip)
        if len(batch) == CLIPS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
