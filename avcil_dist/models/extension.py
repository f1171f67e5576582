"""Extension: parameters of a method's own in the network, such as prompts, adapters or branches."""

from torch import Tensor, nn

from avcil_dist.models.outputs import Output


class Extension(nn.Module):
    """Module that a method adds to the network (`NetworkSpec.extension`); both hooks return their input by default.

    It is trained, committed and restored with the network, and the teacher has its own. Its factory is called with the
    dimension D and the number of classes of the head. No hook mixes the clips of a batch.
    """

    def adapt(self, sound: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return encoded sound (B, D) and tokens (B, T, S, D), adapted, or with prompts as further positions.

        Tokens of feature shards are float16. None is a modality that the network does not have.
        """
        return sound, tokens

    def refine(self, output: Output) -> Output:
        """Return the output, such as with the scores of branches added to its logits."""
        return output

    def grow(self, num_classes: int) -> None:
        """Change the parameters for a head of `num_classes` classes, at the begin of a step."""
