"""Methods as other packages have them: with needs that no built-in method combines, or slow enough to be disturbed."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avcil_dist.config.section import Section
from avcil_dist.methods.avcil import Avcil
from avcil_dist.methods.base import Method, Needs, SamplingWeights, Targets
from avcil_dist.methods.losses import cross_entropy, stored_distance
from avcil_dist.models.extension import Extension
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output


class BalancedReplay(Method):
    """Exemplars keep their logits; all seen classes are drawn equally often, exemplars the rarer the less important."""

    class Options(Section):
        """Weight of the logits."""

        weight: float = 0.1

    @property
    def needs(self) -> Needs:
        """Exemplars among the current clips, their logits, and weights of all."""
        return Needs(memory="join", stored_logits=True, weighted_sampling=True)

    def sampling_weights(self, current: Sequence[int], exemplars: Sequence[int]) -> SamplingWeights:
        """Return weights whose sum is 1 for each class."""
        of_class = [[1 / (1 + number) for number in range(count)] for count in exemplars]
        return SamplingWeights(
            current=[1 / max(1, count) for count in current],
            exemplars=[[weight / math.fsum(weights) for weight in weights] for weights in of_class],
        )

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE + weight · distance to the stored logits."""
        loss = cross_entropy(output.logits, targets.labels)
        if targets.stored is not None:
            loss = loss + self.options.weight * stored_distance(output.logits, *targets.stored)
        return {"loss": loss}


class PromptPool(Extension):
    """Prompts with keys: each clip takes those whose keys are closest to the mean of its tokens."""

    def __init__(self, dim: int, num_classes: int, size: int = 8, length: int = 2, taken: int = 3) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(size, dim))
        self.prompts = nn.Parameter(torch.randn(size, length, dim) * 0.02)
        self.taken = taken

    def adapt(self, sound: Any, tokens: Any) -> tuple[Any, Any]:
        """Add the chosen prompts as further positions: (B, T, S, D) -> (B, T, S + taken · length, D)."""
        query = F.normalize(tokens.float().mean(dim=(1, 2)), dim=1)
        self.similarity, chosen = (query @ F.normalize(self.keys, dim=1).T).topk(self.taken)
        prompts = self.prompts[chosen].flatten(1, 2)
        return sound, torch.cat([tokens, prompts[:, None].expand(-1, tokens.shape[1], -1, -1)], dim=2)

    def refine(self, output: Output) -> Output:
        """Hand the similarities (B, taken) to the loss."""
        return output._replace(auxiliary=self.similarity)


class LearningToPrompt(Method):
    """Cross-entropy over the new classes, and keys that move to their queries; without exemplars."""

    class Options(Section):
        weight: float = 0.5

    @property
    def needs(self) -> Needs:
        """A pool of prompts; after step 0 the layers around it stay as they are."""
        return Needs(network_spec=NetworkSpec(extension=PromptPool, freeze_shared=True))

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE over the new logits - weight · mean similarity of queries and keys."""
        assert output.auxiliary is not None
        old = self.context.num_old
        new = cross_entropy(output.logits[:, old:], targets.labels - old)
        similarity = output.auxiliary.mean()
        return {"loss": new - self.options.weight * similarity, "new_classes": new, "similarity": similarity}


class SlowAvcil(Avcil):
    """AV-CIL with the same bits, and iterations of at least 50 ms on every machine: a test can disturb a short step."""

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return the loss of AV-CIL, late."""
        time.sleep(0.05)
        return super().loss(targets, output, teacher)


SLOW_AVCIL = f"{__name__}:{SlowAvcil.__name__}"
