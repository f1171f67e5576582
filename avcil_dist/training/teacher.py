"""The teacher: the network of the step before, frozen, outside the student's engine."""

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
    """Locked: `.train()` on it or on what holds it changes nothing, no parameter takes a gradient."""

    def __init__(self, network: Network, device: torch.device) -> None:
        super().__init__()
        assert isinstance(network, HeadedNetwork)
        self.network = network
        self.network.requires_grad_(False).eval().to(device)
        self._is_shared_out = False
        self._answers: TeacherCache | None = None

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return self

    def shard(self, world: World) -> None:
        """Leave each rank its share of the parameters; from then on all ranks must ask the teacher together."""
        self._is_shared_out = True
        shard_out(self.network, world)
        self.network.eval()

    def grow(self, num_classes: int, new_proxies: Tensor | None) -> None:
        """Give the teacher the student's classes, to ask it about clips of new ones."""
        self.network.grow(num_classes, new_proxies)
        self.network.requires_grad_(False).eval()

    def encode(self, batch: Batch) -> Batch:
        """The batch as frozen encoders make it: the student's are the teacher's, so it is done once for both."""
        visual, audio = self.network.encode_frozen(batch.visual, batch.audio)
        return replace(batch, visual=visual, audio=audio)

    def use_cache(self, answers: TeacherCache) -> None:
        """From now on, look up what the teacher said to a clip of these instead of asking it again."""
        self._answers = answers

    def logits(self, batch: Batch) -> Tensor:
        """(B, old classes), as an ordinary tensor: inference tensors cannot be kept for backward."""
        # What ZeRO 3 gathers in inference mode it could not give to autograd later, as `output` needs.
        with torch.no_grad() if self._is_shared_out else torch.inference_mode():
            logits = self.network(batch.visual, batch.audio).logits
        return logits.clone()

    def output(self, batch: Batch, method: Method) -> Output:
        """What the method needs of the teacher: logits, and features with their importance where it asks for them."""
        if self._answers:
            return self._answers.lookup(batch.clips, batch.labels.device)
        if not method.needs.importance:
            return Output(self.logits(batch), None, None)
        with torch.no_grad():
            output: Output = self.network(batch.visual, batch.audio)
        traced = self.network.trace_head(output)
        with torch.enable_grad():
            loss = method.importance_loss(batch.labels, traced).sum()  # a clip's loss knows no other clip
        gradients = torch.autograd.grad(loss, traced.features())
        return output._replace(importance=torch.stack([gradient.norm(dim=1) for gradient in gradients], dim=1))

    def attention_view(self, batch: Batch) -> TeacherView:
        """What the teacher attends to in the batch's exemplars."""
        assert isinstance(self.network, AudioVisualNetwork)
        return self.network.attention_view(batch.visual, batch.audio, slice(batch.num_current, None))
