"""An encoder with the preparation of its inputs."""

from torch import nn

from avcil_dist.config.section import Section
from avcil_dist.data.inputs import Pictures
from avcil_dist.models.encoders.base import VisualEncoder


class MeanColour(VisualEncoder):
    """One token per frame: a linear map of the mean colour of small pictures in [-1, 1]."""

    class Options(Section):
        """Setting of the encoder; `model.visual.dim` on the command line."""

        dim: int = 64

    @classmethod
    def preparation(cls, options, clip):
        """Return small pictures, as many as the settings have."""
        return Pictures(frames=clip.frames, size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __init__(self, options):
        super().__init__(options.dim)
        self.project = nn.Linear(3, options.dim)

    def forward(self, pictures):
        """(B, T, 3, H, W) -> (B, T, 1, D)."""
        return self.project(pictures.mean(dim=(3, 4)))[:, :, None]
