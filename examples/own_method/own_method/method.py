"""Replay with smoothed labels."""

from torch.nn import functional as F

from avcil_dist.config.section import Section
from avcil_dist.methods.base import Method, Needs


class OwnReplay(Method):
    """Cross-entropy with smoothed labels on current clips and exemplars."""

    class Options(Section):
        """Setting of the loss; `method.smoothing` on the command line."""

        smoothing: float = 0.1

    @property
    def needs(self):
        """Exemplars in batches of their own."""
        return Needs(memory="replay")

    def loss(self, targets, output, teacher):
        """Return the mean over the global batch."""
        return {"loss": F.cross_entropy(output.logits, targets.labels, label_smoothing=self.options.smoothing)}
