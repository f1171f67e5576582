"""Schema of the section `model`: the visual and the audio encoder."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from avcil_dist.config.section import Incomparable, PathText, Section


class PrecomputedConfig(Section):
    """Features from feature shards; no encoder runs."""

    kind: Incomparable[Literal["precomputed"]] = Field(description="Kind of encoder.")


class SmallConfig(Section):
    """Small convolutional encoder, trained from scratch; for tests and laptops."""

    kind: Incomparable[Literal["small"]] = Field(description="Kind of encoder.")
    dim: Incomparable[PositiveInt] = Field(64, le=65_536, description="Dimension of a token.")


class TransformerConfig(Section):
    """Vision transformer. The weights must fit dim, depth and heads."""

    weights: Incomparable[PathText] = Field(
        description="Path or hub name (owner/name, or owner/name@REVISION) of the pretrained weights, or `random` for "
        "random initialisation."
    )
    train: Incomparable[Literal["frozen", "partial", "adapters", "full"]] = Field(
        "frozen",
        description="Trained part. `frozen`: none, features are computed on the fly. `partial`: the last blocks (see "
        "last_blocks) and the final norm. `adapters`: low-rank adapters (LoRA, see adapter_rank) of all linear layers "
        "of the blocks, at step 0; its artifact has the merged weights, and they are frozen afterwards. `full`: all "
        "parameters.",
    )
    last_blocks: Incomparable[PositiveInt | None] = Field(
        None, description="Number of blocks that train=partial trains, counted from the output."
    )
    adapter_rank: Incomparable[PositiveInt | None] = Field(None, description="Rank of the adapters of train=adapters.")
    dim: Incomparable[PositiveInt] = Field(768, le=65_536, description="Dimension of a token.")
    depth: Incomparable[PositiveInt] = Field(12, le=1024, description="Number of blocks.")
    heads: Incomparable[PositiveInt] = Field(12, le=1024, description="Number of attention heads per block.")

    @model_validator(mode="after")
    def _check_last_blocks(self) -> "TransformerConfig":
        if (self.last_blocks is not None) != (self.train == "partial"):
            raise ValueError("last_blocks is the number of blocks that train=partial trains; set both, or neither")
        if self.last_blocks is not None and self.last_blocks > self.depth:
            raise ValueError(f"last_blocks={self.last_blocks} is more than depth={self.depth}")
        if (self.adapter_rank is not None) != (self.train == "adapters"):
            raise ValueError("adapter_rank is the rank of the adapters of train=adapters; set both, or neither")
        if self.adapter_rank is not None and self.adapter_rank > self.dim:
            raise ValueError(f"adapter_rank={self.adapter_rank} is more than dim={self.dim}")
        return self


class VideoMAEConfig(TransformerConfig):
    """VideoMAE: tubelets of 2 frames by 16 by 16 pixels (Tong et al. 2022)."""

    kind: Incomparable[Literal["videomae"]] = Field(description="Kind of encoder.")


class AudioMAEConfig(TransformerConfig):
    """AudioMAE: ViT on 16 by 16 patches of the log-mel filterbank (Huang et al. 2022)."""

    kind: Incomparable[Literal["audiomae"]] = Field(description="Kind of encoder.")


class PlugInEncoderConfig(Section):
    """Encoder of another package, by the name of its entry point or as `package.module:Class`, with its own options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: Incomparable[str] = Field(description="Name or class of the encoder.")


FUSIONS = ("attention", "transformer", "concat")
PLUG_IN = "plug-in"
BUILT_IN_KINDS = {"visual": ("precomputed", "small", "videomae"), "audio": ("precomputed", "small", "audiomae")}


def _kind_tag(modality: str) -> Discriminator:
    """Return the discriminator of a modality's encoders: a kind that is not built in is a plug-in's."""

    def tag(value: Any) -> str | None:
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        return kind if kind is None or kind in BUILT_IN_KINDS[modality] else PLUG_IN

    return Discriminator(tag)


VisualConfig = PrecomputedConfig | SmallConfig | VideoMAEConfig | PlugInEncoderConfig
AudioConfig = PrecomputedConfig | SmallConfig | AudioMAEConfig | PlugInEncoderConfig


class ModelConfig(Section):
    """The two encoders. Attention, projections and head follow from their dimension."""

    modality: Incomparable[Literal["both", "audio", "visual"]] = Field(
        "both", description="Modalities that the model is trained on."
    )
    fusion: Incomparable[str] = Field(
        "attention",
        description="Pooling of the visual tokens over time. `attention`: attention over the frames, as published. "
        "`concat`: the frames side by side, each with a projection of its own, so that their order counts. "
        "`transformer`: two transformer blocks over a token of the sound and one of each frame. Or a plug-in's name, "
        "or class as `package.module:Class`.",
    )
    visual: Annotated[
        Annotated[PrecomputedConfig, Tag("precomputed")]
        | Annotated[SmallConfig, Tag("small")]
        | Annotated[VideoMAEConfig, Tag("videomae")]
        | Annotated[PlugInEncoderConfig, Tag(PLUG_IN)],
        _kind_tag("visual"),
    ]
    audio: Annotated[
        Annotated[PrecomputedConfig, Tag("precomputed")]
        | Annotated[SmallConfig, Tag("small")]
        | Annotated[AudioMAEConfig, Tag("audiomae")]
        | Annotated[PlugInEncoderConfig, Tag(PLUG_IN)],
        _kind_tag("audio"),
    ]

    @field_validator("fusion", mode="before")
    @classmethod
    def _rename_fusion(cls, value: Any) -> Any:
        return "attention" if value == "sum" else value  # its name in streams of earlier versions

    @model_validator(mode="after")
    def _check_fusion(self) -> "ModelConfig":
        if self.fusion != "attention" and self.modality == "audio":
            raise ValueError(f"fusion={self.fusion} is about frames, and modality=audio has none; remove one of them")
        return self

    @property
    def used(self) -> tuple[VisualConfig | AudioConfig, ...]:
        """The encoders of the modality."""
        return {"both": (self.visual, self.audio), "audio": (self.audio,), "visual": (self.visual,)}[self.modality]


def trained_part(encoder: VisualConfig | AudioConfig) -> str | None:
    """Return the trained part of a transformer, its setting `train`; None for an encoder without this setting."""
    part = getattr(encoder, "train", None)
    return part if isinstance(part, str) else None
