"""Separated softmax for incremental learning (Ahn et al. 2021), as the baseline of Pian et al. 2023."""

from torch import Tensor

from avcil_dist.config.method_options import SsilOptions
from avcil_dist.methods.base import Method, Needs, Targets
from avcil_dist.methods.losses import cross_entropy, separated_softmax, task_distillation
from avcil_dist.models.outputs import Output


class Ssil(Method):
    """Separated softmax + task-wise distillation, with a batch of exemplars beside each current batch."""

    Options = SsilOptions

    @property
    def needs(self) -> Needs:
        """A teacher and replay."""
        return Needs(teacher=True, memory="replay", whole_classes=True)

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards separated softmax + task-wise KD."""
        if teacher is None:
            return {"loss": cross_entropy(output.logits, targets.labels)}
        context = self.context
        separated = separated_softmax(output.logits, targets.labels, targets.num_current, context.num_old)
        distillation = task_distillation(
            output.logits, teacher.logits, context.old_tasks, self.options.distillation_temperature
        )
        return {"loss": separated + distillation, "separated_softmax": separated, "task_distillation": distillation}


METHOD = Ssil
