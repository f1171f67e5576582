"""iCaRL: exemplars among the training clips, distillation by binary cross-entropy, nearest mean of exemplars.

Source: Rebuffi et al. 2017, as the baseline of Pian et al. 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from avcil_dist.config import Section
from avcil_dist.methods.base import Method, Needs, StepContext, Targets
from avcil_dist.methods.losses import cross_entropy, sigmoid_distillation
from avcil_dist.methods.nearest_mean import class_means, nearness
from avcil_dist.models.outputs import Output


class Icarl(Method):
    """CE_all + distillation of the old logits, on current clips and exemplars together.

    While a step trains, its classes have no means and the head predicts.
    """

    class Options(Section):
        """How to predict, and which form the distillation has."""

        variant: Literal["released", "paper"] = Field(
            "released", description="the authors' program, which takes the sigmoid twice, or once"
        )
        predict: Literal["nme", "fc"] = Field("nme", description="by the nearest mean of exemplars, or by the head")

    means: Tensor | None = None

    @property
    def needs(self) -> Needs:
        """A teacher, exemplars that join, and their features to predict by."""
        return Needs(teacher=True, memory="join", selection="herding", means=self.options.predict == "nme")

    def begin_step(self, context: StepContext) -> None:
        """The means were of the network of the step before."""
        super().begin_step(context)
        self.means = None

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """CE_all at step 0; from then on with distillation."""
        cross = cross_entropy(output.logits, targets.labels)
        if teacher is None:
            return {"loss": cross}
        old = output.logits[:, : self.context.num_old]
        distilled = sigmoid_distillation(old, teacher.logits, self.options.variant)
        return {"loss": cross + distilled, "cross_entropy": cross, "distillation": distilled}

    def end_step(self, exemplars: Sequence[Tensor] | None) -> None:
        """Take the means."""
        self.means = None if exemplars is None else class_means(exemplars)

    def scores(self, output: Output) -> Tensor:
        """Nearness to each class's mean, where there are means; else the logits."""
        return output.logits if self.means is None else nearness(output.feature, self.means)

    def state_dict(self) -> dict[str, Any]:
        """The means, so that the step's artifact predicts as the step did."""
        return {} if self.means is None else {"means": self.means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The means."""
        self.means = state.get("means")


METHOD = Icarl
