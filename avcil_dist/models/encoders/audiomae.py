"""AudioMAE (Huang et al. 2022), by timm's vision transformer."""

from collections.abc import Collection, Sequence
from typing import Self

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avcil_dist.config.encoders import AudioMAEConfig
from avcil_dist.data.inputs import Sound
from avcil_dist.models.encoders.base import PATCH, AudioEncoder, Transformer, check_multiple
from avcil_dist.models.encoders.weights import load_strictly, read_weights

# Parameters of pre-training or of a classifier: dropped from a checkpoint. All others must fit.
DROPPED = ("decoder", "mask_token", "head.")


class AudioMAE(Transformer, AudioEncoder):
    """Mean over AudioMAE's patch tokens, without the class token."""

    input_dims = 3

    @classmethod
    def build(cls, options: AudioMAEConfig, inputs: Sound, state_keys: Collection[str] | None = None) -> Self:
        """Build the encoder, as for every `Encoder`.

        Raises ConfigError for filterbanks that the patches do not divide, and as `read_weights` and `load_strictly` do.
        """
        check_multiple("data.clip.mel_frames", inputs.mel_frames, PATCH)
        check_multiple("data.clip.mel_bins", inputs.mel_bins, PATCH)
        check_multiple("model.audio.dim", options.dim, options.heads)
        state = read_weights(options, "model.audio.weights") if state_keys is None else None
        names = state if state_keys is None else {key.removeprefix("body.") for key in state_keys}
        body = VisionTransformer(
            img_size=(inputs.mel_frames, inputs.mel_bins),
            patch_size=PATCH,
            in_chans=1,
            num_classes=0,
            global_pool="avg",
            embed_dim=options.dim,
            depth=options.depth,
            num_heads=options.heads,
            # Fine-tuned checkpoints have the norm after the mean, pre-trained ones before it.
            fc_norm=names is not None and "fc_norm.weight" in names,
        )
        if state is not None:
            load_strictly(body, state, DROPPED, f"model.audio.weights: {options.weights}")
        return cls(options.dim, body, options, state_keys)

    def checkpoint_activations(self) -> None:
        """Recompute activations in backward, by the library's own implementation."""
        assert isinstance(self.body, VisionTransformer)
        self.body.set_grad_checkpointing(True)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks."""
        return self.body.blocks

    @property
    def norms(self) -> Sequence[nn.Module]:
        """Norm before the mean and norm after it; one of them is an identity."""
        return [self.body.norm, self.body.fc_norm]

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, mel_frames, mel_bins) -> (B, D)."""
        return self.body(inputs.unsqueeze(1))
