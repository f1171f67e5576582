"""Networks: encoders, audio-guided attention over visual tokens, projections and a head.

A network of one modality has a projection and a head. `network_spec.py` lists the variants that a method can need.
Source: Pian et al. 2023, eq. 1-6.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig, Precision
from avcil_dist.errors import ConfigError
from avcil_dist.models.anchor import Anchor, pool_tokens
from avcil_dist.models.attention.module import AudioGuidedAttention, TeacherView
from avcil_dist.models.booster import Booster
from avcil_dist.models.branches import Branches
from avcil_dist.models.encoders.base import Encoder, VisualEncoder
from avcil_dist.models.encoders.build import build_audio_encoder, build_visual_encoder
from avcil_dist.models.extension import Extension
from avcil_dist.models.fusion import Fusion, fusion_class
from avcil_dist.models.heads import Head, LinearHead, ProxyHead, grow_linear, grow_proxies, zero_rows
from avcil_dist.models.network_spec import DEFAULT_SPEC, NetworkSpec
from avcil_dist.models.outputs import Divergence, Encoded, Output, sum_present
from avcil_dist.models.precision import precision_context

PROJECTIONS = ("audio_proj", "visual_proj")


class Network(nn.Module, ABC):
    """Student or teacher network. It computes in `precision`; its weights and its output are float32."""

    precision: Precision = "float32"
    visual_encoder: Encoder | None
    audio_encoder: Encoder | None

    def forward(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None = None) -> Output:
        """Classify a batch.

        `visual` and `audio` are inputs of the encoders: features (B, T, S, D) and (B, D), or pictures
        (B, frames, 3, H, W) and log-mel (B, mel_frames, mel_bins). `teacher` is a teacher's view of the last rows;
        with it the output has a divergence.
        """
        with precision_context(self.precision, audio.device):
            output = self.classify(visual, audio, teacher)
        return output if self.precision == "float32" else output.map(Tensor.float)

    @torch.no_grad()
    def encode_frozen(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Encode `visual` and `audio` where the encoder is frozen, for all networks that share these encoders.

        The input of an encoder that is not frozen is returned unchanged.
        """
        with precision_context(self.precision, audio.device):
            return (
                self.visual_encoder.encode_if_frozen(visual) if self.visual_encoder else visual,
                self.audio_encoder.encode_if_frozen(audio) if self.audio_encoder else audio,
            )

    @abstractmethod
    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Compute `forward` in the dtype of the surrounding autocast block."""


class HeadedNetwork(Network):
    """Network with projections and a head."""

    audio_proj: nn.Linear
    visual_proj: nn.Linear
    classifier: Head

    def __init__(self) -> None:
        super().__init__()
        self.anchor: Anchor | None = None
        self.extension: Extension | None = None
        self.branches: Branches | None = None
        self.has_booster = False
        self.booster: Booster | None = None  # of the steps after the first
        self.freezes_shared = False  # whether the layers that all steps share are frozen after step 0

    @property
    def num_classes(self) -> int:
        """Number of classes of the head."""
        return self.classifier.num_classes

    def grow(self, num_classes: int, new_proxies: Tensor | None = None) -> None:
        """Replace the head by a larger one, before the engine is built: an engine does not update later parameters.

        A head of proxies needs `new_proxies`, those of the new classes.
        """
        if self.freezes_shared:
            self._freeze_shared()
        if isinstance(self.classifier, LinearHead):
            num_old, width = self.num_classes, None
            if self.has_booster:
                self.booster = Booster(self.projections, num_classes)
            if self.branches is not None:
                self.branches.grow(self.projections, num_classes - num_old)
                width = self.classifier.in_features // (self.branches.count - 1) * self.branches.count
            self.classifier = grow_linear(self.classifier, num_classes, width)
            if self.anchor is not None:
                zero_rows(self.classifier, num_old)
        else:
            assert new_proxies is not None
            self.classifier = grow_proxies(self.classifier, num_classes, new_proxies)
        if self.extension is not None:
            self.extension.grow(num_classes)

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """Projections of the modalities that the network has, by name."""
        return {name: layer for name, layer in self.named_children() if name in PROJECTIONS}  # type: ignore[misc]

    def _freeze_shared(self) -> None:
        """Freeze all but the head, the method's extension, the booster, and the projections of a newest branch."""
        of_a_step = {"classifier", "extension", "booster", *(self.projections if self.branches is not None else ())}
        for name, module in self.named_children():
            if name not in of_a_step:
                module.requires_grad_(False)

    def adapted(self, sound: Tensor | None, tokens: Tensor | None) -> tuple[Any, Any]:
        """Return encoded sound and tokens as the method's extension adapts them, if there is one."""
        return (sound, tokens) if self.extension is None else self.extension.adapt(sound, tokens)

    def tokens_of_anchor(self) -> "PooledTokens":
        """Return the network of the anchor's features, as they are before a constant is added."""
        assert self.anchor is not None
        visual, audio = self.anchor.visual_encoder, self.anchor.audio_encoder
        return PooledTokens(visual or self.visual_encoder, audio or self.audio_encoder, (self.anchor.num_cells, 1))

    def finished(self, output: Output, encoded: Encoded) -> Output:
        """Return the output with the scores of the anchor, and as the extension refines it, where there are these."""
        if self.anchor is not None:
            output = output._replace(logits=output.logits + self.anchor(*encoded))
        return output if self.extension is None else self.extension.refine(output)

    def project_and_classify(
        self, sound: Tensor | None, pooled: Tensor | None, divergence: Divergence | None = None
    ) -> Output:
        """Project encoded sound (B, D) and pooled tokens (B, D; or the width of the fusion), and classify their sum."""
        audio = None if sound is None else torch.relu(self.audio_proj(sound))
        visual = None if pooled is None else torch.relu(self.visual_proj(pooled))
        auxiliary = None
        if self.branches is not None:
            if self.branches.auxiliary is not None:
                auxiliary = self.branches.auxiliary(sum_present(audio, visual))
            if sound is not None and audio is not None:
                audio = self.branches.join("audio_proj", sound, audio)
            if pooled is not None and visual is not None:
                visual = self.branches.join("visual_proj", pooled, visual)
        if self.booster is not None and self.training:
            auxiliary = self.booster(sound, pooled)
        logits = self.classifier(sum_present(audio, visual))
        return Output(logits, audio, visual, pooled, divergence, auxiliary=auxiliary)

    def trace_head(self, output: Output) -> Output:
        """Return the output with a graph that begins at its features: `audio`, `pooled`, and `visual` from `pooled`."""
        with torch.enable_grad():
            audio = None if output.audio is None else output.audio.detach().requires_grad_()
            pooled = None if output.pooled is None else output.pooled.detach().requires_grad_()
            visual = None if pooled is None else torch.relu(self.visual_proj(pooled))
            return Output(self.classifier(sum_present(audio, visual)), audio, visual, pooled)


class AudioVisualNetwork(HeadedNetwork):
    """Network of sound and pictures. Both encoders have the same dimension D.

    Without a `fusion` the attention pools positions and frames, as published. With one it pools the positions of each
    frame, the fusion makes the inputs of the projections, and the divergence of the temporal attention is 0.
    """

    visual_encoder: Encoder
    audio_encoder: Encoder

    def __init__(
        self,
        visual_encoder: Encoder,
        audio_encoder: Encoder,
        num_classes: int,
        head: ProxyHead | None = None,
        fusion: Fusion | None = None,
    ) -> None:
        super().__init__()
        dim = visual_encoder.dim
        self.visual_encoder = visual_encoder
        self.audio_encoder = audio_encoder
        self.attention = AudioGuidedAttention(dim)
        self.fusion = fusion
        self.audio_proj = nn.Linear(dim, dim)
        self.visual_proj = nn.Linear(fusion.width if fusion else dim, dim)
        self.classifier = head or LinearHead(dim, num_classes)

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Pool the visual tokens by audio-guided attention, project both modalities, classify their sum."""
        encoded = self._encoded(visual, audio)
        sound, tokens = self.adapted(encoded.sound, encoded.tokens)
        pooled, divergence = self.attention(*self._attended(sound, tokens), teacher)
        return self.classify_pooled(encoded, sound, pooled, divergence)

    def classify_pooled(
        self, encoded: Encoded, sound: Tensor, pooled: Tensor, divergence: Divergence | None = None
    ) -> Output:
        """Classify adapted sound (B, D) and the attention's pooled tokens: (B, D), or (B · T, D) for a fusion."""
        if self.fusion is None:
            return self.finished(self.project_and_classify(sound, pooled, divergence), encoded)
        num_frames = self.fusion.num_frames
        if divergence is not None:
            divergence = Divergence(*(part.view(len(part) // num_frames, -1).sum(dim=1) for part in divergence))
        mixed, frames = self.fusion(sound, pooled.unflatten(0, (-1, num_frames)))
        return self.finished(self.project_and_classify(mixed, frames, divergence), encoded)

    @torch.no_grad()
    def attention_view(self, visual: Tensor, audio: Tensor) -> tuple[TeacherView, Encoded]:
        """Return the attention and what it is given, a teacher's side of the distillation, and the encodings."""
        with precision_context(self.precision, audio.device):
            encoded = self._encoded(visual, audio)
            return TeacherView(self.attention, *self._attended(*self.adapted(encoded.sound, encoded.tokens))), encoded

    def _encoded(self, visual: Tensor, audio: Tensor) -> Encoded:
        return Encoded(visual, audio, self.visual_encoder(visual), self.audio_encoder(audio))

    def _attended(self, sound: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the attention, sound (B, D) and tokens (B, T, S, D).

        For a fusion, every frame is a clip of one frame to the attention, (B · T, 1, S, D): its softmax over time is 1.
        """
        if self.fusion is None:
            return sound, tokens
        return sound.repeat_interleave(tokens.shape[1], dim=0), tokens.flatten(0, 1).unsqueeze(1)


class AudioNetwork(HeadedNetwork):
    """Network of sound alone."""

    visual_encoder: None = None
    audio_encoder: Encoder

    def __init__(self, encoder: Encoder, num_classes: int, head: ProxyHead | None = None) -> None:
        super().__init__()
        self.audio_encoder = encoder
        self.audio_proj = nn.Linear(encoder.dim, encoder.dim)
        self.classifier = head or LinearHead(encoder.dim, num_classes)

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Project and classify the sound; `visual` is ignored."""
        encoded = self.audio_encoder(audio)
        sound, _ = self.adapted(encoded, None)
        return self.finished(self.project_and_classify(sound, None), Encoded(visual, audio, None, encoded))


class VisualNetwork(HeadedNetwork):
    """Network of pictures alone, pooled by the mean over their tokens; for a `fusion`, by that over each frame's."""

    visual_encoder: Encoder
    audio_encoder: None = None

    def __init__(
        self, encoder: Encoder, num_classes: int, head: ProxyHead | None = None, fusion: Fusion | None = None
    ) -> None:
        super().__init__()
        self.visual_encoder = encoder
        self.fusion = fusion
        self.visual_proj = nn.Linear(fusion.width if fusion else encoder.dim, encoder.dim)
        self.classifier = head or LinearHead(encoder.dim, num_classes)

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Pool, project and classify the pictures; `audio` is ignored."""
        encoded = self.visual_encoder(visual)
        _, tokens = self.adapted(None, encoded)
        if self.fusion is not None:
            _, pooled = self.fusion(None, tokens.mean(dim=2, dtype=torch.float32))
        else:
            pooled = tokens.mean(dim=(1, 2), dtype=torch.float32)
        return self.finished(self.project_and_classify(None, pooled), Encoded(visual, audio, encoded, None))


class PooledTokens(Network):
    """Encoders, and the mean of each cell of a grid of visual tokens. It has no trained parameters of its own."""

    def __init__(self, visual_encoder: Encoder | None, audio_encoder: Encoder | None, grid: tuple[int, int]) -> None:
        super().__init__()
        self.visual_encoder = visual_encoder
        self.audio_encoder = audio_encoder
        self.grid = grid

    def classify(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None) -> Output:
        """Return encoded `audio` (B, D) and pooled `visual` (B, cells, D); `logits` are empty, (B, 0)."""
        sound = None if self.audio_encoder is None else self.audio_encoder(audio)
        if self.visual_encoder is None:
            return Output(audio.new_zeros(audio.shape[0], 0), sound, None)
        cells = pool_tokens(self.visual_encoder(visual), self.grid)
        return Output(cells.new_zeros(cells.shape[0], 0), sound, cells)


def build_network(
    model: ModelConfig,
    clip: ClipConfig,
    feature_shape: Mapping[str, int],
    num_classes: int,
    *,
    network_spec: NetworkSpec = DEFAULT_SPEC,
    num_frozen: int = 0,
    num_earlier: int = 0,
    state_keys: Collection[str] | None = None,
) -> Network:
    """Build a network with fresh weights (from torch's global generator), except those that the config names.

    With `state_keys`, the keys of a whole state that the caller loads, no weights are read. `feature_shape` is the
    manifest's: frames, positions and dim of features, empty for clips. In a head of proxies, those of the first
    `num_frozen` of the `num_classes` are frozen. `num_earlier` is the number of earlier steps, for branches and
    the booster. Raises ConfigError when the encoders do not fit the data or each other.
    """
    dim = feature_shape.get("dim")

    def keys_of(encoder: str) -> list[str] | None:
        own = None if state_keys is None else [key for key in state_keys if key.startswith(encoder)]
        return own and [key.removeprefix(encoder) for key in own]

    visual = audio = None
    if model.modality != "audio":
        visual = build_visual_encoder(model.visual, clip, dim, keys_of("visual_encoder."))
    if model.modality != "visual":
        audio = build_audio_encoder(model.audio, clip, dim, keys_of("audio_encoder."))
    if visual is not None and audio is not None and visual.dim != audio.dim:
        raise ConfigError(
            f"model: the visual encoder has dim {visual.dim}, the audio encoder {audio.dim}; "
            "set model.visual.dim and model.audio.dim to the same number"
        )
    if network_spec.pool is not None:
        return PooledTokens(visual, audio, network_spec.pool)

    def head(dim: int) -> ProxyHead | None:
        if network_spec.head == "linear":
            return None
        return ProxyHead(dim, num_classes, num_frozen, network_spec.num_proxies)

    num_frames = 1 if visual is None else _num_frames(visual, feature_shape)
    fusion_kind = None if visual is None else fusion_class(model.fusion)
    fusion = fusion_kind(visual.dim, num_frames) if visual is not None and fusion_kind is not None else None
    network: HeadedNetwork
    if visual is None:
        assert audio is not None
        network = AudioNetwork(audio, num_classes, head(audio.dim))
    elif audio is None:
        network = VisualNetwork(visual, num_classes, head(visual.dim), fusion)
    else:
        network = AudioVisualNetwork(visual, audio, num_classes, head(visual.dim), fusion)
    _add_parts(network, network_spec, num_frames, num_earlier, num_classes - num_frozen)
    return network


def _add_parts(network: HeadedNetwork, spec: NetworkSpec, num_frames: int, num_earlier: int, num_new: int) -> None:
    """Add what a method has beside encoders, projections and head."""
    if spec.anchor is not None:
        _add_anchor(network, min(spec.anchor, num_frames))
    if spec.extension is not None:
        encoder = network.visual_encoder or network.audio_encoder
        assert encoder is not None
        network.extension = spec.extension(encoder.dim, network.num_classes)
    network.has_booster, network.freezes_shared = spec.booster, spec.freeze_shared
    if spec.booster and num_earlier:
        network.booster = Booster(network.projections, network.num_classes)
    if spec.branches:
        _add_branches(network, spec, num_earlier, num_new)


def _add_branches(network: HeadedNetwork, network_spec: NetworkSpec, num_earlier: int, num_new: int) -> None:
    """Add the branches of earlier steps, and replace the head by one on the features of all."""
    head = network.classifier
    assert isinstance(head, LinearHead)
    network.branches = Branches(network.projections, num_earlier, num_new)
    network.classifier = LinearHead(network.branches.count * head.in_features, head.num_classes)


def _add_anchor(network: HeadedNetwork, num_cells: int) -> None:
    """Add an anchor of zeros, and make the head's rows zero: before training the logits are the anchor's scores."""
    visual, audio, head = network.visual_encoder, network.audio_encoder, network.classifier
    assert isinstance(head, LinearHead)
    num_tokens = (num_cells if visual else 0) + (1 if audio else 0)
    network.anchor = Anchor(
        num_cells,
        num_tokens * head.in_features + 1,
        network.num_classes,
        visual_encoder=visual.fixed_copy() if visual else None,
        audio_encoder=audio.fixed_copy() if audio else None,
    )
    zero_rows(head, 0)


def _num_frames(visual: Encoder, feature_shape: Mapping[str, int]) -> int:
    """Number of frames (or tubelets of 2 frames) that the visual encoder returns."""
    if "frames" in feature_shape:
        return feature_shape["frames"]
    assert isinstance(visual, VisualEncoder)
    return visual.num_frames
