"""Weight aligning: distillation, and after it the new classes' weights are scaled to the length of the old ones'.

Source: Zhao et al. 2020 (arXiv 1911.07053).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from avcil_dist.config.method_options import WaOptions
from avcil_dist.config.section import Section
from avcil_dist.methods.base import Method, Needs, Targets
from avcil_dist.methods.losses import cross_entropy, soft_cross_entropy
from avcil_dist.models.outputs import Output

HEAD = "classifier.weight"


class Wa(Method):
    """(1 − λ) CE_all + λ KD on current clips and exemplars together, λ the share of old classes."""

    Options: ClassVar[type[Section]] = WaOptions

    @property
    def needs(self) -> Needs:
        """A teacher, and exemplars among the current clips."""
        return Needs(teacher=True, memory="join", selection="herding")

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards with distillation."""
        cross = cross_entropy(output.logits, targets.labels)
        if teacher is None:
            return {"loss": cross}
        old, share = self.context.num_old, self.context.num_old / self.context.num_seen
        distillation = soft_cross_entropy(output.logits[:, :old], teacher.logits, self.options.distillation_temperature)
        total = (1 - share) * cross + share * distillation
        return {"loss": total, "cross_entropy": cross, "distillation": distillation}

    def committed_weights(self, weights: Mapping[str, Tensor], calibration: Sequence[float]) -> dict[str, Tensor]:
        """Scale the head's rows of new classes to the mean length of the old classes' rows. Biases stay."""
        if self.context.num_old == 0:
            return dict(weights)
        head = weights[HEAD].clone()
        lengths = head.norm(dim=1)
        old, new = lengths[: self.context.num_old].mean(), lengths[self.context.num_old :].mean()
        head[self.context.num_old :] *= old / new
        return {**weights, HEAD: head}


METHOD = Wa
