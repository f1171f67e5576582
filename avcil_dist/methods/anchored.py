"""Anchored network: the scores of the head by evidence as a fixed term of the logits, and a network trained beside it.

z = s · φᵀW + z_net. W is the head of `analytic` from sums over all clips so far, solved anew before each step trains;
z_net is that of the network's head, whose new rows begin as zeros. So before training the network of step 0 predicts as
`analytic` does. The network before training, epoch 0, is a candidate of the best epoch in every step. Where encoders
are trained, φ comes from frozen copies of them as they were at first. The loss is balanced softmax (Ren et al. 2020)
with task-wise distillation (Li and Hoiem 2016).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from avcil_dist.config.method_options import AnchoredOptions
from avcil_dist.methods.analytic import Analytic
from avcil_dist.methods.base import Method, Needs, StepContext, Targets
from avcil_dist.methods.losses import balanced_softmax, task_distillation
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output


class Anchored(Method):
    """Balanced softmax and task-wise KD on z = s · φᵀW + z_net. The state is that of `analytic`."""

    Options = AnchoredOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._analytic = Analytic(
            Analytic.Options(pool=(options.parts, 1), unit_length=True, gamma="evidence", gammas=[1.0])
        )
        self._log_counts: Tensor | None = None

    @property
    def needs(self) -> Needs:
        """A teacher, replay, an anchored network, and its state before training as a candidate."""
        return Needs(teacher=True, memory="replay", untrained=True, network_spec=NetworkSpec(anchor=self.options.parts))

    @property
    def anchor(self) -> Analytic:
        """The head by evidence."""
        return self._analytic

    def anchor_weights(self) -> Tensor:
        """Return s · W."""
        assert self._analytic.weights is not None
        return self.options.scale * self._analytic.weights

    def begin_step(self, context: StepContext) -> None:
        """Begin a step."""
        super().begin_step(context)
        self._analytic.begin_step(context)

    def begin_training(self, expected_counts: Tensor, num_batches: int) -> None:
        """Keep log π."""
        self._log_counts = expected_counts.log().float()

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return balanced softmax + KD; at step 0 without KD."""
        assert self._log_counts is not None
        self._log_counts = self._log_counts.to(output.logits.device)
        balanced = balanced_softmax(output.logits, targets.labels, self._log_counts)
        if teacher is None:
            return {"loss": balanced}
        distillation = task_distillation(
            output.logits, teacher.logits, self.context.old_tasks, self.options.distillation_temperature
        )
        return {"loss": balanced + distillation, "balanced_softmax": balanced, "task_distillation": distillation}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and the anchor's head with its ridge."""
        return self._analytic.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._analytic.load_state_dict(state)

    def check_state(self, num_seen: int) -> None:
        """Check the sums and the anchor's head."""
        self._analytic.check_state(num_seen)


METHOD = Anchored
