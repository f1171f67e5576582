"""iCaRL: exemplars among the training clips, distillation by binary cross-entropy, nearest mean of exemplars.

Source: Rebuffi et al. 2017, as the baseline of Pian et al. 2023.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from avcil_dist.config.section import Section
from avcil_dist.methods.base import Needs, Targets
from avcil_dist.methods.losses import cross_entropy, sigmoid_distillation
from avcil_dist.methods.nearest_mean import NearestMean
from avcil_dist.models.outputs import Output


class Icarl(NearestMean):
    """CE_all + distillation of the old logits, on current clips and exemplars together."""

    class Options(Section):
        """How to predict, and which form the distillation has."""

        variant: Literal["released", "paper"] = Field(
            "released", description="the authors' program, which takes the sigmoid twice, or once"
        )
        predict: Literal["nme", "fc"] = Field("nme", description="by the nearest mean of exemplars, or by the head")

    @property
    def needs(self) -> Needs:
        """A teacher, exemplars that join, and their features to predict by."""
        return Needs(teacher=True, memory="join", selection="herding", means=self.options.predict == "nme")

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """CE_all at step 0; from then on with distillation."""
        cross = cross_entropy(output.logits, targets.labels)
        if teacher is None:
            return {"loss": cross}
        old = output.logits[:, : self.context.num_old]
        distilled = sigmoid_distillation(old, teacher.logits, self.options.variant)
        return {"loss": cross + distilled, "cross_entropy": cross, "distillation": distilled}


METHOD = Icarl
