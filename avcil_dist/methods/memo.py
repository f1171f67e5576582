"""MEMO: each step has a specialised block of its own, the head is on those of all steps; shared layers lie below.

Specialised are the projections of sound and pictures; attention, fusion and trained encoders are shared. A step begins
with a copy of the newest projections and freezes the earlier ones. After it, the new classes' weights are aligned as in
`wa`. Source: Zhou et al. 2023 (arXiv 2205.13218), there the last stage of a residual network, shared layers trained or
frozen after step 0.
"""

import torch
from torch import Tensor

from avcil_dist.config.method_options import MemoOptions
from avcil_dist.methods.base import Needs, Targets
from avcil_dist.methods.losses import cross_entropy
from avcil_dist.methods.wa import Wa
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output


class Memo(Wa):
    """CE_all + α · CE of the newest block's own head, in which all old classes are one."""

    Options = MemoOptions

    @property
    def needs(self) -> Needs:
        """Exemplars among the current clips, and a network of branches."""
        spec = NetworkSpec(branches=True, freeze_shared=not self.options.train_shared)
        return Needs(memory="join", selection="herding", network_spec=spec)

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards with the auxiliary loss."""
        cross = cross_entropy(output.logits, targets.labels)
        if output.auxiliary is None:
            return {"loss": cross}
        labels = torch.clamp(targets.labels - self.context.num_old + 1, min=0)
        auxiliary = cross_entropy(output.auxiliary, labels)
        total = cross + self.options.lambda_auxiliary * auxiliary
        return {"loss": total, "cross_entropy": cross, "auxiliary": auxiliary}


METHOD = Memo
