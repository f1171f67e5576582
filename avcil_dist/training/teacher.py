"""Teacher: the frozen network of the previous step, outside the student's engine."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from avcil_dist.data.batch import Batch
from avcil_dist.methods.base import Method
from avcil_dist.models.attention.module import TeacherView
from avcil_dist.models.network import AudioVisualNetwork, HeadedNetwork, Network
from avcil_dist.models.outputs import Output
from avcil_dist.training.engine import shard_out
from avcil_dist.training.teacher_cache import TeacherCache
from avcil_dist.world import World


class Teacher(nn.Module):
    """Teacher network, always in evaluation mode and without gradients, even after `.train()` on it or its parent."""

    def __init__(self, network: Network, device: torch.device) -> None:
        super().__init__()
        assert isinstance(network, HeadedNetwork)
        self.network = network
        self.network.requires_grad_(False).eval().to(device)
        self._is_sharded = False
        self._cache: TeacherCache | None = None

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return self

    def shard(self, world: World) -> None:
        """Shard the parameters over the ranks. Afterwards every forward is a collective of all ranks."""
        self._is_sharded = True
        shard_out(self.network, world)
        self.network.eval()

    def grow(self, num_classes: int, new_proxies: Tensor | None) -> None:
        """Grow the head to the student's classes, for methods with a teacher loss on clips of new classes."""
        self.network.grow(num_classes, new_proxies)
        self.network.requires_grad_(False).eval()

    def encode_shared(self, batch: Batch) -> Batch:
        """Run the frozen encoders once for student and teacher: both have the same weights there."""
        visual, audio = self.network.encode_frozen(batch.visual, batch.audio)
        return replace(batch, visual=visual, audio=audio)

    def use_cache(self, cache: TeacherCache) -> None:
        """Look up all further outputs in `cache`."""
        self._cache = cache

    def logits(self, batch: Batch) -> Tensor:
        """Return logits (B, old classes) as an ordinary tensor: autograd cannot save inference tensors."""
        # Parameters that ZeRO 3 gathers in inference mode stay inference tensors, and `output` may need their graph.
        with torch.no_grad() if self._is_sharded else torch.inference_mode():
            logits = self.network(batch.visual, batch.audio).logits
        return logits.clone()

    def output(self, batch: Batch, method: Method) -> Output:
        """Return what the method needs: the logits; and the features with their importance if `needs.importance`."""
        if self._cache:
            return self._cache.lookup(batch.clips, batch.labels.device)
        if not method.needs.importance:
            return Output(self.logits(batch))
        with torch.no_grad():
            output: Output = self.network(batch.visual, batch.audio)
        traced = self.network.trace_head(output)
        with torch.enable_grad():
            # The loss of one clip depends on no other clip, so the gradient of the sum has each clip's in its row.
            loss = method.importance_loss(batch.labels, traced).sum()
        gradients = torch.autograd.grad(loss, traced.features())
        return output._replace(importance=torch.stack([gradient.norm(dim=1) for gradient in gradients], dim=1))

    def attention_view(self, batch: Batch) -> TeacherView:
        """Return the teacher's attention and its encoded tokens for the batch's exemplars."""
        assert isinstance(self.network, AudioVisualNetwork)
        return self.network.attention_view(batch.visual[batch.num_current :], batch.audio[batch.num_current :])[0]
