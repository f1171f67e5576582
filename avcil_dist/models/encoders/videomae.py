"""VideoMAE (Tong et al. 2022), by the transformers library, and the parameter names of its checkpoints."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Self

import transformers
from torch import Tensor, nn

from avcil_dist.config.encoders import VideoMAEConfig
from avcil_dist.data.inputs import Pictures
from avcil_dist.models.encoders.base import PATCH, TUBELET, Transformer, VisualEncoder, check_multiple
from avcil_dist.models.encoders.weights import load_strictly, read_weights

# Parameters of pre-training or of a classifier: dropped from a checkpoint. All others must fit.
DROPPED = ("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.", "head.")
# Parameter names in the authors' files, and in the library.
AUTHORS_NAMES = (
    (r"^encoder\.(?=patch_embed\.|blocks\.|norm\.)", ""),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.attention."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.q_bias$", ".query.bias"),
    (r"\.v_bias$", ".value.bias"),
)


class VideoMAE(Transformer, VisualEncoder):
    """Last hidden state of VideoMAE."""

    input_dims = 5

    @classmethod
    def build(cls, options: VideoMAEConfig, inputs: Pictures, state_keys: Collection[str] | None = None) -> Self:
        """Build the encoder, as for every `Encoder`.

        Raises ConfigError for clips that the patches do not divide, and as `read_weights` and `load_strictly` do.
        """
        check_multiple("data.clip.size", inputs.size, PATCH)
        check_multiple("data.clip.frames", inputs.frames, TUBELET)
        check_multiple("model.visual.dim", options.dim, options.heads)
        state = read_weights(options, "model.visual.weights") if state_keys is None else None
        if state is not None:
            state = library_names(state)
        names = state if state_keys is None else {key.removeprefix("body.") for key in state_keys}
        body = transformers.VideoMAEModel(
            transformers.VideoMAEConfig(
                image_size=inputs.size,
                patch_size=PATCH,
                num_frames=inputs.frames,
                tubelet_size=TUBELET,
                hidden_size=options.dim,
                num_hidden_layers=options.depth,
                num_attention_heads=options.heads,
                intermediate_size=4 * options.dim,
                # The library's name for "no final norm": true of classifiers, false of the pre-trained model.
                use_mean_pooling=names is not None and "layernorm.weight" not in names,
            )
        )
        if state is not None:
            load_strictly(body, state, DROPPED, f"model.visual.weights: {options.weights}")
        return cls(options.dim, body, options, state_keys)

    @property
    def num_frames(self) -> int:
        """Number of tubelets."""
        return self.pictures.frames // TUBELET

    def checkpoint_activations(self) -> None:
        """Recompute activations in backward, by the library's own implementation."""
        assert isinstance(self.body, transformers.PreTrainedModel)
        self.body.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks."""
        return self.body.encoder.layer

    @property
    def norms(self) -> Sequence[nn.Module]:
        """Final norm; a fine-tuned checkpoint has none over its tokens."""
        return [] if self.body.layernorm is None else [self.body.layernorm]

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, frames, 3, H, W) -> (B, frames/2, H/16 · W/16, D)."""
        tokens = self.body(inputs).last_hidden_state
        return tokens.unflatten(1, (inputs.shape[1] // TUBELET, -1))


def library_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the library's parameter names.

    Accepted are the library's current names, its former ones (with a prefix, and biases apart from their layers),
    and the authors', who store query, key and value in one matrix.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix("videomae.")
        for pattern, replacement in AUTHORS_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".qkv.weight"):
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            renamed |= {f"{name.removesuffix('qkv.weight')}{part}.weight": piece for part, piece in parts}
        else:
            renamed[name] = tensor
    return renamed
