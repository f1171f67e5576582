"""iCaRL: exemplars among the training clips, distillation by binary cross-entropy, nearest mean of exemplars.

Source: Rebuffi et al. 2017, as the baseline of Pian et al. 2023.
"""

from torch import Tensor

from avcil_dist.config.method_options import IcarlOptions
from avcil_dist.methods.base import Needs, Targets
from avcil_dist.methods.losses import cross_entropy, sigmoid_distillation
from avcil_dist.methods.nearest_mean import NearestMean
from avcil_dist.models.outputs import Output


class Icarl(NearestMean):
    """CE_all + distillation of the old logits, on current clips and exemplars together."""

    Options = IcarlOptions

    @property
    def needs(self) -> Needs:
        """A teacher, exemplars among the current clips, and their features for the class means."""
        return Needs(teacher=True, memory="join", selection="herding", means=self.options.predict == "nme")

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards with distillation."""
        cross = cross_entropy(output.logits, targets.labels)
        if teacher is None:
            return {"loss": cross}
        old = output.logits[:, : self.context.num_old]
        distillation = sigmoid_distillation(old, teacher.logits, self.options.variant)
        return {"loss": cross + distillation, "cross_entropy": cross, "distillation": distillation}


METHOD = Icarl
