"""The audio-visual network: two encoders, audio-guided attention, a projection each, and a head.

Source: Pian et al. 2023, eq. 1-6.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avcil_dist.config import ClipConfig, ModelConfig
from avcil_dist.errors import ConfigError
from avcil_dist.models.attention import AudioGuidedAttention, TeacherView
from avcil_dist.models.encoders import Encoder, build_audio_encoder, build_visual_encoder
from avcil_dist.models.heads import LinearHead, grow
from avcil_dist.models.outputs import Output


class AudioVisualNetwork(nn.Module):
    """A student or a teacher. Both encoders have the same dimension D."""

    def __init__(self, visual_encoder: Encoder, audio_encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        dim = visual_encoder.dim
        self.visual_encoder = visual_encoder
        self.audio_encoder = audio_encoder
        self.attention = AudioGuidedAttention(dim)
        self.audio_proj = nn.Linear(dim, dim)
        self.visual_proj = nn.Linear(dim, dim)
        self.classifier = LinearHead(dim, num_classes)

    @property
    def num_classes(self) -> int:
        """How many classes the head knows."""
        return self.classifier.num_classes

    def grow(self, num_classes: int) -> None:
        """Replace the head by a larger one. Only before an engine is built: an engine would not see the new rows."""
        self.classifier = grow(self.classifier, num_classes)

    def forward(self, visual: Tensor, audio: Tensor, teacher: TeacherView | None = None) -> Output:
        """Classify a batch.

        `visual` and `audio` are what the encoders take: features (B, T, S, D) and (B, D), or
        pictures (B, frames, 3, H, W) and log-mel (B, mel_frames, mel_bins). `teacher` is a
        teacher's view of the last rows; with it the output has a divergence.
        """
        sound = self.audio_encoder(audio)
        pooled, divergence = self.attention(sound, self.visual_encoder(visual), teacher)
        audio_feature = torch.relu(self.audio_proj(sound))
        visual_feature = torch.relu(self.visual_proj(pooled))
        return Output(self.classifier(audio_feature + visual_feature), audio_feature, visual_feature, divergence)

    @torch.no_grad()
    def view(self, visual: Tensor, audio: Tensor, rows: slice) -> TeacherView:
        """As a teacher: encode these rows of a batch for the student to compare its attention with."""
        return TeacherView(self.attention, self.audio_encoder(audio[rows]), self.visual_encoder(visual[rows]))


def build_network(
    model: ModelConfig, clip: ClipConfig, feature_shape: Mapping[str, int], num_classes: int
) -> AudioVisualNetwork:
    """Make a network with fresh weights (from torch's global generator), except those that the config names.

    `feature_shape` is the manifest's: frames, positions and dim of features, empty for clips.
    Raises ConfigError when the encoders do not fit the data or each other.
    """
    visual_encoder = build_visual_encoder(model.visual, clip, feature_shape.get("dim"))
    audio_encoder = build_audio_encoder(model.audio, clip, feature_shape.get("dim"))
    if visual_encoder.dim != audio_encoder.dim:
        raise ConfigError(
            f"model: the visual encoder has dim {visual_encoder.dim}, the audio encoder {audio_encoder.dim}; "
            "set model.visual.dim and model.audio.dim to the same number"
        )
    return AudioVisualNetwork(visual_encoder, audio_encoder, num_classes)
