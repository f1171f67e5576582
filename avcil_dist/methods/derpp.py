"""DER++: replay with the labels of the exemplars, and with the logits of an earlier network.

Source: Buzzega et al. 2020 (arXiv 2004.07211). There the logits are those of the moment at which an exemplar is stored,
and two batches of exemplars are drawn; here they are those of the previous step's network, and one batch has both
terms.
"""

from pydantic import Field
from torch import Tensor

from avcil_dist.config.section import Section
from avcil_dist.methods.base import Method, Needs, Targets
from avcil_dist.methods.losses import cross_entropy, logit_distance
from avcil_dist.models.outputs import Output


class Derpp(Method):
    """CE of current clips + α · mean squared distance of the exemplars' old logits + β · CE of exemplars."""

    class Options(Section):
        """Weights of the terms of exemplars."""

        lambda_logits: float = Field(0.1, ge=0, description="α: weight of the distance to the teacher's logits")
        lambda_labels: float = Field(0.5, ge=0, description="β: weight of the cross-entropy of exemplars")

    @property
    def needs(self) -> Needs:
        """A teacher and replay."""
        return Needs(teacher=True, memory="replay")

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards the sum of the three terms."""
        if teacher is None:
            return {"loss": cross_entropy(output.logits, targets.labels)}
        current, kept = slice(0, targets.num_current), slice(targets.num_current, None)
        old = self.context.num_old
        cross = cross_entropy(output.logits[current], targets.labels[current])
        labels = cross_entropy(output.logits[kept], targets.labels[kept])
        logits = logit_distance(output.logits[kept, :old], teacher.logits[kept])
        total = cross + self.options.lambda_logits * logits + self.options.lambda_labels * labels
        return {"loss": total, "current": cross, "logits": logits, "exemplars": labels}


METHOD = Derpp
