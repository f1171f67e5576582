"""DER++: replay with the labels of the exemplars, and with the logits of an earlier network.

Source: Buzzega et al. 2020 (arXiv 2004.07211). There the logits are those of the moment at which an exemplar is stored,
and two batches of exemplars are drawn. Here one batch has both terms. An exemplar is stored at the end of its step:
`logits: stored` keeps the logits of that moment, for the classes that there were; `previous` are those of the previous
step's network.
"""

from torch import Tensor

from avcil_dist.config.method_options import DerppOptions
from avcil_dist.methods.base import Method, Needs, Targets
from avcil_dist.methods.losses import cross_entropy, logit_distance, stored_distance
from avcil_dist.models.outputs import Output


class Derpp(Method):
    """CE of current clips + α · mean squared distance of the exemplars' old logits + β · CE of exemplars."""

    Options = DerppOptions

    @property
    def needs(self) -> Needs:
        """Replay, and a teacher or stored logits."""
        is_stored = self.options.logits == "stored"
        return Needs(teacher=not is_stored, stored_logits=is_stored, memory="replay")

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards the sum of the three terms."""
        if teacher is None and targets.stored is None:
            return {"loss": cross_entropy(output.logits, targets.labels)}
        current, kept = slice(0, targets.num_current), slice(targets.num_current, None)
        cross = cross_entropy(output.logits[current], targets.labels[current])
        labels = cross_entropy(output.logits[kept], targets.labels[kept])
        if targets.stored is not None:
            logits = stored_distance(output.logits[kept], *(rows[kept] for rows in targets.stored))
        else:
            assert teacher is not None
            logits = logit_distance(output.logits[kept, : self.context.num_old], teacher.logits[kept])
        total = cross + self.options.lambda_logits * logits + self.options.lambda_labels * labels
        return {"loss": total, "current": cross, "logits": logits, "exemplars": labels}


METHOD = Derpp
