"""FOSTER: a booster learns what the previous step's network lacks, and both together teach a network of one size.

The boosted logits F are those of the teacher, 0 for new classes, plus the booster's. Source: Wang et al. 2022
(arXiv 2204.04662). There the booster is a backbone that is trained first, and the network is compressed after it; here
it is projections above shared layers, and both losses are minimised in one training: no gradient passes from the second
to the booster.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.config.method_options import FosterOptions
from avcil_dist.methods.base import Method, Needs, Targets
from avcil_dist.methods.losses import cross_entropy, soft_cross_entropy
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output

Share = Annotated[float, Field(ge=0, lt=1)]


class Foster(Method):
    """CE(F / w) + CE(own head) + λ KD(F, teacher) for the booster, and balanced distillation of F for the network."""

    Options = FosterOptions

    _weights: Tensor | None = None  # (2, C), for boosting and for compression

    @property
    def needs(self) -> Needs:
        """A teacher, exemplars among the current clips, and a network with a booster."""
        return Needs(teacher=True, memory="join", selection="herding", network_spec=NetworkSpec(booster=True))

    def begin_training(self, expected_counts: Tensor, num_batches: int) -> None:
        """Keep the class weights for the clips of each class in an epoch."""
        counts, options = expected_counts * num_batches, self.options
        betas = options.beta_boosting, options.beta_compression
        self._weights = torch.stack([class_weights(counts, beta) for beta in betas]).float()

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards the losses of booster and network."""
        if teacher is None:
            return {"loss": cross_entropy(output.logits, targets.labels)}
        assert output.auxiliary is not None
        assert self._weights is not None
        self._weights = self._weights.to(output.logits.device)
        for_boosting, for_compression = self._weights
        options, old = self.options, self.context.num_old
        residual, own = output.auxiliary.chunk(2, dim=1)
        boosted = residual + F.pad(teacher.logits.detach(), (0, self.context.num_seen - old))
        aligned = cross_entropy(boosted / for_boosting, targets.labels)
        enhancement = cross_entropy(own, targets.labels)
        distillation = soft_cross_entropy(boosted[:, :old], teacher.logits, options.distillation_temperature)
        compression = balanced_distillation(output.logits, boosted, for_compression, options.distillation_temperature)
        return {
            "loss": aligned + enhancement + options.lambda_distillation * distillation + compression,
            "boosting": aligned,
            "enhancement": enhancement,
            "distillation": distillation,
            "compression": compression,
        }


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """Return the weight (C,) of each class, the inverse of its effective number (1 − βⁿ) / (1 − β); their mean is 1.

    Source: Cui et al. 2019 (arXiv 1901.05555). A class without clips counts as if it had one.
    """
    effective = (1 - beta ** counts.clamp(min=1)) / (1 - beta)
    return len(counts) / effective / (1 / effective).sum()


def balanced_distillation(logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of logits (B, C) with the teacher's probabilities, each times its class's weight; mean over rows.

    The products are normalised to probabilities. Source: Wang et al. 2022, balanced distillation.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    products = F.softmax(teacher_logits.detach() / temperature, dim=1) * weights
    teacher = products / products.sum(dim=1, keepdim=True)
    return -(teacher * student).sum() / max(1, len(logits))


METHOD = Foster
