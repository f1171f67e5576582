"""Learning without forgetting: distillation from the previous network on new clips, no exemplars.

Source: Li and Hoiem 2016, as the baseline of Pian et al. 2023.
"""

from torch import Tensor

from avcil_dist.config.method_options import LwfOptions
from avcil_dist.methods.base import Method, Needs, Targets
from avcil_dist.methods.losses import cross_entropy, separated_softmax, task_distillation
from avcil_dist.models.outputs import Output


class Lwf(Method):
    """Cross-entropy over the new logits + task-wise distillation, both on current clips."""

    Options = LwfOptions

    @property
    def needs(self) -> Needs:
        """A teacher."""
        return Needs(teacher=True, whole_classes=True)

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards CE over new logits + task-wise KD."""
        if teacher is None:
            return {"loss": cross_entropy(output.logits, targets.labels)}
        context, labels = self.context, targets.labels
        new = separated_softmax(output.logits, labels, len(labels), context.num_old)
        distillation = task_distillation(
            output.logits, teacher.logits, context.old_tasks, self.options.distillation_temperature
        )
        return {"loss": new + distillation, "new_classes": new, "task_distillation": distillation}


METHOD = Lwf
