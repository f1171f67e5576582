"""AudioMAE (Huang et al. 2022), by timm's vision transformer."""

from collections.abc import Collection, Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avcil_dist.config.encoders import AudioMAEConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.models.encoders.base import PATCH, Transformer, check_multiple
from avcil_dist.models.encoders.weights import load_strictly, read_weights

# Parameters of pre-training or of a classifier: dropped from a checkpoint. All others must fit.
DROPPED = ("decoder", "mask_token", "head.")


class AudioMAE(Transformer):
    """Mean over AudioMAE's patch tokens, without the class token."""

    input_dims = 3

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


def build_audiomae(config: AudioMAEConfig, clip: ClipConfig, state_keys: Collection[str] | None) -> AudioMAE:
    """Build the encoder with the weights that the config names.

    With `state_keys`, the keys of a state that the caller loads, no weights are read. Raises ConfigError for
    filterbanks that the patches do not divide, and as `read_weights` and `load_strictly` do.
    """
    check_multiple("data.clip.mel_frames", clip.mel_frames, PATCH)
    check_multiple("data.clip.mel_bins", clip.mel_bins, PATCH)
    check_multiple("model.audio.dim", config.dim, config.heads)
    state = read_weights(config, "model.audio.weights") if state_keys is None else None
    names = state if state_keys is None else {key.removeprefix("body.") for key in state_keys}
    body = VisionTransformer(
        img_size=(clip.mel_frames, clip.mel_bins),
        patch_size=PATCH,
        in_chans=1,
        num_classes=0,
        global_pool="avg",
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        # Fine-tuned checkpoints have the norm after the mean, pre-trained ones before it.
        fc_norm=names is not None and "fc_norm.weight" in names,
    )
    if state is not None:
        load_strictly(body, state, DROPPED, f"model.audio.weights: {config.weights}")
    return AudioMAE(config.dim, body, config)
