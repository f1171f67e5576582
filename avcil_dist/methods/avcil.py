"""AV-CIL: audio-visual class-incremental learning (Pian, Mo, Guo, Tian, ICCV 2023, arXiv 2308.11073).

Separated softmax and task-wise distillation, with dual audio-visual similarity constraints
(equations 5-7) and visual attention distillation (equations 8-10).
"""

from torch import Tensor

from avcil_dist.config.method_options import AvcilOptions
from avcil_dist.methods.base import Method, Needs, Targets
from avcil_dist.methods.losses import (
    attention_distillation,
    class_contrast,
    cross_entropy,
    instance_contrast,
    separated_softmax,
    task_distillation,
)
from avcil_dist.models.outputs import Output


class Avcil(Method):
    """The total is separated softmax + task-wise KD + λ_I L_I + λ_C L_C + λ L_S + (1 − λ) L_T."""

    has_static_loss = True

    Options = AvcilOptions

    @property
    def needs(self) -> Needs:
        """A teacher, exemplars, and the divergence of attention if it is distilled."""
        options = self.options
        return Needs(
            teacher=True,
            memory="replay",
            whole_classes=True,
            divergence=options.attention,
            both_modalities=options.instance or options.class_aware or options.attention,
        )

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards the sum of all terms."""
        if teacher is None:
            return {"loss": cross_entropy(output.logits, targets.labels)}
        options, context, labels = self.options, self.context, targets.labels
        parts = {
            "separated_softmax": separated_softmax(output.logits, labels, targets.num_current, context.num_old),
            "task_distillation": task_distillation(
                output.logits, teacher.logits, context.old_tasks, options.distillation_temperature
            ),
        }
        total = parts["separated_softmax"] + parts["task_distillation"]
        if options.instance:
            parts["instance"] = instance_contrast(*output.modalities, options.contrast_temperature)
            total = total + options.lambda_instance * parts["instance"]
        if options.class_aware:
            parts["class_aware"] = class_contrast(
                *output.modalities, labels, options.contrast_temperature, options.variant
            )
            total = total + options.lambda_class * parts["class_aware"]
        if output.divergence is not None:
            parts["attention"] = attention_distillation(output.divergence, options.lambda_attention)
            total = total + parts["attention"]
        return {"loss": total, **parts}


METHOD = Avcil
