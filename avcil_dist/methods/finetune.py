"""Fine-tuning on the new classes, without teacher or exemplars: the lower bound."""

from torch import Tensor

from avcil_dist.methods.base import Method, Targets
from avcil_dist.methods.losses import cross_entropy
from avcil_dist.models.outputs import Output


class Finetune(Method):
    """Cross-entropy over all seen classes, on current clips."""

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all."""
        return {"loss": cross_entropy(output.logits, targets.labels)}


METHOD = Finetune
