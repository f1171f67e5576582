"""Networks: encoders, and what follows them (`network_spec.py`).

With sound and pictures that is audio-guided attention, a projection each, and a head; with one of
the two, a projection and a head. Source: Pian et al. 2023, eq. 1-6.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig, Precision
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView
from avcil_dist.models.encoders.base import Encoder
from avcil_dist.models.encoders.build import build_audio_encoder, build_visual_encoder
from avcil_dist.models.heads import Head, LinearHead, ProxyHead, grow_linear, grow_proxies
from avcil_dist.models.network_spec import DEFAULT_SPEC, NetworkSpec
from avcil_dist.models.outputs import Divergence, Output, sum_present
from avcil_dist.models.precision import precision_context


class Network(nn.Module, ABC):
    """A student or a teacher. It computes in `precision`; its weights and its output are float32."""

    precision: Precision = "float32"
    visual_encoder: Encoder | None
    audio_encoder: Encoder | None

    def forward(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None = None) -> Output:
        """Classify a batch.

        `visual` and `audio` are what the encoders take: features (B, T, S, D) and (B, D), or
        pictures (B, frames, 3, H, W) and log-mel (B, mel_frames, mel_bins). `teacher` is a
        teacher's view of the last rows; with it the output has a divergence.
        """
        with precision_context(self.precision, audio.device):
            output = self.classify(visual, audio, teacher)
        return output if self.precision == "float32" else output.map(Tensor.float)

    @torch.no_grad()
    def encode_frozen(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """`visual` and `audio` as frozen encoders make them, others as they are: for every network with the same."""
        with precision_context(self.precision, audio.device):
            return (
                self.visual_encoder.encode_if_frozen(visual) if self.visual_encoder else visual,
                self.audio_encoder.encode_if_frozen(audio) if self.audio_encoder else audio,
            )

    @abstractmethod
    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """`forward`, in the dtype of the block that it is called in."""


class HeadedNetwork(Network):
    """A network that ends in projections and a head."""

    audio_proj: nn.Linear
    visual_proj: nn.Linear
    classifier: Head

    @property
    def num_classes(self) -> int:
        """How many classes the head knows."""
        return self.classifier.num_classes

    def grow(self, num_classes: int, new_proxies: Tensor | None = None) -> None:
        """Replace the head by a larger one. Only before an engine is built: an engine would not see the new rows.

        A head of proxies is given those of the new classes.
        """
        if isinstance(self.classifier, LinearHead):
            self.classifier = grow_linear(self.classifier, num_classes)
        else:
            assert new_proxies is not None
            self.classifier = grow_proxies(self.classifier, num_classes, new_proxies)

    def project_and_classify(
        self, sound: Tensor | None, pooled: Tensor | None, divergence: Divergence | None = None
    ) -> Output:
        """From encoded sound (B, D) and pooled pictures (B, D) to the output."""
        audio = None if sound is None else torch.relu(self.audio_proj(sound))
        visual = None if pooled is None else torch.relu(self.visual_proj(pooled))
        return Output(self.classifier(sum_present(audio, visual)), audio, visual, pooled, divergence)

    def trace_head(self, output: Output) -> Output:
        """The same output, with a graph from its features to its logits and nothing before them."""
        with torch.enable_grad():
            audio = None if output.audio is None else output.audio.detach().requires_grad_()
            pooled = None if output.pooled is None else output.pooled.detach().requires_grad_()
            visual = None if pooled is None else torch.relu(self.visual_proj(pooled))
            return Output(self.classifier(sum_present(audio, visual)), audio, visual, pooled)


class AudioVisualNetwork(HeadedNetwork):
    """Sound and pictures. Both encoders have the same dimension D."""

    visual_encoder: Encoder
    audio_encoder: Encoder

    def __init__(
        self, visual_encoder: Encoder, audio_encoder: Encoder, num_classes: int, head: ProxyHead | None = None
    ) -> None:
        super().__init__()
        dim = visual_encoder.dim
        self.visual_encoder = visual_encoder
        self.audio_encoder = audio_encoder
        self.attention = AudioGuidedAttention(dim)
        self.audio_proj = nn.Linear(dim, dim)
        self.visual_proj = nn.Linear(dim, dim)
        self.classifier = head or LinearHead(dim, num_classes)

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Attend to the pictures as the sound guides, project both, classify their sum."""
        sound = self.audio_encoder(audio)
        pooled, divergence = self.attention(sound, self.visual_encoder(visual), teacher)
        return self.project_and_classify(sound, pooled, divergence)

    @torch.no_grad()
    def attention_view(self, visual: Tensor, audio: Tensor, rows: slice) -> TeacherView:
        """As a teacher: encode these rows of a batch for the student to compare its attention with."""
        with precision_context(self.precision, audio.device):
            return TeacherView(self.attention, self.audio_encoder(audio[rows]), self.visual_encoder(visual[rows]))


class AudioNetwork(HeadedNetwork):
    """Sound alone."""

    visual_encoder: None = None
    audio_encoder: Encoder

    def __init__(self, encoder: Encoder, num_classes: int, head: ProxyHead | None = None) -> None:
        super().__init__()
        self.audio_encoder = encoder
        self.audio_proj = nn.Linear(encoder.dim, encoder.dim)
        self.classifier = head or LinearHead(encoder.dim, num_classes)

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Project the sound and classify it; the pictures are not looked at."""
        return self.project_and_classify(self.audio_encoder(audio), None)


class VisualNetwork(HeadedNetwork):
    """Pictures alone, pooled by the mean over their tokens."""

    visual_encoder: Encoder
    audio_encoder: None = None

    def __init__(self, encoder: Encoder, num_classes: int, head: ProxyHead | None = None) -> None:
        super().__init__()
        self.visual_encoder = encoder
        self.visual_proj = nn.Linear(encoder.dim, encoder.dim)
        self.classifier = head or LinearHead(encoder.dim, num_classes)

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Pool the pictures, project, classify; the sound is not listened to."""
        return self.project_and_classify(None, self.visual_encoder(visual).mean(dim=(1, 2), dtype=torch.float32))


class PooledTokens(Network):
    """Encoders, and the mean of each cell of a grid of visual tokens. Nothing is learnt here."""

    def __init__(self, visual_encoder: Encoder | None, audio_encoder: Encoder | None, grid: tuple[int, int]) -> None:
        super().__init__()
        self.visual_encoder = visual_encoder
        self.audio_encoder = audio_encoder
        self.grid = grid

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """`audio` (B, D) and `visual` (B, cells · D) as encoded; there are no logits, (B, 0).

        A grid finer than the tokens is cut down to them: a mean of one token, taken twice, is no new feature.
        """
        sound = None if self.audio_encoder is None else self.audio_encoder(audio)
        if self.visual_encoder is None:
            return Output(audio.new_zeros(len(audio), 0), sound, None)
        tokens = self.visual_encoder(visual)
        grid = (min(self.grid[0], tokens.shape[1]), min(self.grid[1], tokens.shape[2]))
        cells = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2).float(), grid).permute(0, 2, 3, 1)
        return Output(cells.new_zeros(len(tokens), 0), sound, cells.flatten(1))


def build_network(
    model: ModelConfig,
    clip: ClipConfig,
    feature_shape: Mapping[str, int],
    num_classes: int,
    *,
    network_spec: NetworkSpec = DEFAULT_SPEC,
    num_frozen: int = 0,
    state_keys: Collection[str] | None = None,
) -> Network:
    """Make a network with fresh weights (from torch's global generator), except those that the config names.

    Where the caller goes on to put in a whole state, `state_keys` are its names, and no named weights are read.
    `feature_shape` is the manifest's: frames, positions and dim of features, empty for clips. Of the
    head's `num_classes`, proxies of the first `num_frozen` are frozen. Raises ConfigError when the
    encoders do not fit the data or each other.
    """
    dim = feature_shape.get("dim")

    def names(encoder: str) -> list[str] | None:
        own = None if state_keys is None else [name for name in state_keys if name.startswith(encoder)]
        return own and [name.removeprefix(encoder) for name in own]

    visual = audio = None
    if model.modality != "audio":
        visual = build_visual_encoder(model.visual, clip, dim, names("visual_encoder."))
    if model.modality != "visual":
        audio = build_audio_encoder(model.audio, clip, dim, names("audio_encoder."))
    if visual is not None and audio is not None and visual.dim != audio.dim:
        raise ConfigError(
            f"model: the visual encoder has dim {visual.dim}, the audio encoder {audio.dim}; "
            "set model.visual.dim and model.audio.dim to the same number"
        )
    if network_spec.pool is not None:
        return PooledTokens(visual, audio, network_spec.pool)

    def head(width: int) -> ProxyHead | None:
        return (
            ProxyHead(width, num_classes, num_frozen, network_spec.num_proxies)
            if network_spec.head == "proxies"
            else None
        )

    if visual is None:
        assert audio is not None
        return AudioNetwork(audio, num_classes, head(audio.dim))
    if audio is None:
        return VisualNetwork(visual, num_classes, head(visual.dim))
    return AudioVisualNetwork(visual, audio, num_classes, head(visual.dim))


def load_whole_state(network: Network, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a complete state dict, frozen parts and buffers included, into a network.

    Raises ArtifactError, naming `source` and some of the names, for missing or unknown weights and other shapes.
    """
    expected = network.state_dict()
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "of another shape": [
            name for name in expected if name in weights and weights[name].shape != expected[name].shape
        ],
    }
    texts = [f"{len(names)} {fault} ({', '.join(names[:3])})" for fault, names in faults.items() if names]
    if texts:
        raise ArtifactError(
            f"{source}: its weights are not those of the network: {'; '.join(texts)}; use the configuration and the "
            "version of the program that made it, or begin anew with --restart"
        )
    network.load_state_dict(dict(weights))
