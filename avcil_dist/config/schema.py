"""The settings of a run, as typed sections. What a file may say is written here and nowhere else.

How files are found, extended and overridden is `compose.py`.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

Precision = Literal["float32", "bf16", "fp16"]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipConfig(Section):
    """How a raw clip becomes tensors. The defaults are those of VideoMAE and AudioMAE."""

    frames: PositiveInt = Field(16, description="frames taken evenly over the clip")
    size: PositiveInt = Field(224, description="side of the square picture, pixels")
    sample_rate: PositiveInt = Field(16_000, description="sound is resampled to this, Hz")
    mel_bins: PositiveInt = Field(128, description="bins of the log-mel filterbank")
    mel_frames: PositiveInt = Field(1024, description="filterbank frames of 10 ms; longer sound is cut, shorter padded")
    mel_mean: float = Field(-4.2677393, description="normalisation is (x - mean) / (2 std)")
    mel_std: PositiveFloat = 4.5689974
    silent: Literal["error", "silence"] = Field(
        "error", description="a clip without an audio track: an error, or silence"
    )


class AugmentConfig(Section):
    """Random variations of training clips, the same for all frames of a clip; none by default."""

    crop: float = Field(
        1.0, gt=0, le=1, description="smallest share of the picture that a random resized crop keeps; 1.0: no crop"
    )
    flip: float = Field(0.0, ge=0, le=1, description="probability of a mirrored picture")
    brightness: float = Field(0.0, ge=0, le=1, description="colour jitter: most that a picture's is changed by")
    contrast: float = Field(0.0, ge=0, le=1)
    saturation: float = Field(0.0, ge=0, le=1)
    hue: float = Field(0.0, ge=0, le=0.5, description="as a share of the circle of colours")
    time_mask: int = Field(0, ge=0, description="a stretch of fewer filterbank frames than this is masked")
    mel_mask: int = Field(0, ge=0, description="a band of fewer filterbank bins than this is masked")

    @property
    def is_on(self) -> bool:
        """Whether anything is varied."""
        return self != AugmentConfig()


class DataConfig(Section):
    """Which clips, and how they are read."""

    manifest: str = Field(description="path or url of manifest.json")
    shuffle_window: PositiveInt = Field(16, description="shards that the shuffle mixes at a time")
    canonical_nodes: PositiveInt = Field(
        1, description="ranges of the plan; fixes the global batches, whatever the machines"
    )
    decode_workers: int = Field(0, ge=0, description="decoding processes a rank; 0 decodes in the rank's own process")
    read_threads: PositiveInt = Field(8, description="reads at a time, a rank or decoding process")
    shard_cache: str = Field(
        "auto",
        description="folder on the local disk for whole shards, shared by the processes of a node; `none`: ranged "
        "reads; `auto`: a folder below TMPDIR for remote shards, local ones are read where they are",
    )
    shard_cache_gigabytes: PositiveFloat = Field(
        50.0, description="most that the cache holds; shards for which there is no room are read by ranges"
    )
    clip_cache: Literal["auto", "device", "host", "none"] = Field(
        "auto",
        description="where clips stay for the epochs after the one that read them: device memory, host memory shared "
        "by the processes of a node, or nowhere; `auto`: the fastest that has room for the step's clips",
    )
    prefetch_shards: PositiveInt = Field(2, description="shards fetched into the cache ahead of their first use")
    retry_seconds: PositiveFloat = Field(300.0, description="a remote read is tried again for so long")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="damaged clips that an epoch may skip before the step stops"
    )
    source_disjoint: bool = Field(
        False,
        description="also test on the clips whose source video (the key up to its last _) no training clip is from",
    )
    clip: ClipConfig = ClipConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _masks_leave_something(self) -> "DataConfig":
        for mask, size in (("time_mask", "mel_frames"), ("mel_mask", "mel_bins")):
            longest, whole = getattr(self.augment, mask), getattr(self.clip, size)
            if longest > whole:
                raise ValueError(f"augment.{mask}={longest} is more than clip.{size}={whole}")
        return self


class ScenarioConfig(Section):
    """The class stream."""

    classes_per_step: PositiveInt | list[PositiveInt] = Field(
        description="classes of every step, or a list with the number of each"
    )
    classes: list[str] | None = Field(
        None, description="the classes in order of arrival; default: the manifest's, as listed"
    )
    shuffle_seed: int | None = Field(None, description="seed of a shuffled class order")


class PrecomputedConfig(Section):
    """Features from feature shards; nothing is computed."""

    kind: Literal["precomputed"]


class SmallConfig(Section):
    """Convolutions that a laptop trains from scratch."""

    kind: Literal["small"]
    dim: PositiveInt = 64


class TransformerConfig(Section):
    """A vision transformer. `weights` is a path, a hub name, or `random`, and must fit the sizes given here."""

    weights: str = Field(description="path, hub name, or `random` (never silently random)")
    train: Literal["frozen", "partial", "full"] = Field(
        "frozen",
        description="frozen: features computed on the fly, no gradient, no optimizer state; partial: the last blocks "
        "and the final norm are trained; full: all",
    )
    last_blocks: PositiveInt | None = Field(None, description="blocks that train=partial trains")
    dim: PositiveInt = 768
    depth: PositiveInt = 12
    heads: PositiveInt = 12

    @model_validator(mode="after")
    def _blocks_are_there(self) -> "TransformerConfig":
        if (self.last_blocks is not None) != (self.train == "partial"):
            raise ValueError("last_blocks says how many blocks train=partial trains; set both, or neither")
        if self.last_blocks is not None and self.last_blocks > self.depth:
            raise ValueError(f"last_blocks={self.last_blocks} of depth={self.depth}; there are not so many")
        return self


class VideoMAEConfig(TransformerConfig):
    """VideoMAE: tubelets of 2 frames by 16 by 16 pixels (Tong et al. 2022)."""

    kind: Literal["videomae"]


class AudioMAEConfig(TransformerConfig):
    """AudioMAE: ViT on 16 by 16 patches of the log-mel filterbank (Huang et al. 2022)."""

    kind: Literal["audiomae"]


class ModelConfig(Section):
    """The two encoders; attention, projections and head follow from their dimension."""

    modality: Literal["both", "audio", "visual"] = Field("both", description="learn from sound and pictures, or one")
    visual: Annotated[PrecomputedConfig | SmallConfig | VideoMAEConfig, Field(discriminator="kind")]
    audio: Annotated[PrecomputedConfig | SmallConfig | AudioMAEConfig, Field(discriminator="kind")]

    @property
    def used(self) -> tuple[PrecomputedConfig | SmallConfig | VideoMAEConfig | AudioMAEConfig, ...]:
        """The encoders of the modality."""
        return {"both": (self.visual, self.audio), "audio": (self.audio,), "visual": (self.visual,)}[self.modality]


class MethodConfig(Section):
    """A method by name, and its own options; each method's file says which it has."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


class MemoryConfig(Section):
    """The exemplars, shared evenly by the classes remembered."""

    size: int = Field(0, ge=0, description="exemplars in all")
    selection: Literal["published", "random", "herding"] = Field(
        "published", description="which clips of a class: random, nearest to its mean, or as the method is published"
    )


class OptimConfig(Section):
    """Adam with weight decay as L2, constant learning rate. Batches are global: of all ranks together."""

    lr: PositiveFloat = 1e-3
    weight_decay: float = Field(1e-4, ge=0)
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a transformer's block, as a share of that of the block above it"
    )
    epochs: PositiveInt = 200
    global_batch: PositiveInt = Field(256, description="clips of the current step, global")
    global_replay_batch: PositiveInt = Field(128, description="exemplars beside them, global")
    global_eval_batch: PositiveInt = Field(256, description="clips of an evaluation batch, global")
    keep_epoch: Literal["best_val", "last"] = Field(
        "best_val", description="the epoch whose weights are the step's result"
    )


class EngineConfig(Section):
    """How the step runs on the machines at hand."""

    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    precision: Precision = Field(
        "float32", description="what networks compute in; weights, losses and the optimizer stay float32"
    )
    micro_batch: PositiveInt | None = Field(
        None, description="most clips of a rank at a time; a larger batch is accumulated, exactly; default: all at once"
    )
    max_grad_norm: PositiveFloat | None = Field(None, description="most that the norm of the whole gradient may be")
    checkpoint_encoders: bool = Field(
        False, description="compute the activations of trained transformers anew in the backward pass"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="keep in host memory: the optimizer (ZeRO 1-3), or it and the parameters too (ZeRO 3)"
    )
    teacher: Literal["replicated", "sharded"] = Field(
        "replicated", description="the teacher whole on every rank, or its parameters shared out (ZeRO 3)"
    )
    attention: Literal["auto", "torch"] = Field(
        "auto",
        description="what computes the attention: the fastest there is for the device (C++ that is compiled once, "
        "Triton on a GPU), or plain torch",
    )
    timeout_minutes: PositiveFloat = Field(30.0, description="a rank that waits longer for the others ends the step")

    @model_validator(mode="after")
    def _stage_allows(self) -> "EngineConfig":
        stages = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "parameters": (3,)}[self.offload]
        if self.zero_stage not in stages:
            raise ValueError(f"offload={self.offload} needs zero_stage {_listed(stages)}, it is {self.zero_stage}")
        if self.teacher == "sharded" and self.zero_stage != 3:
            raise ValueError(f"teacher=sharded needs zero_stage 3, it is {self.zero_stage}; use teacher=replicated")
        return self


class SnapshotConfig(Section):
    """How often a step writes down where it stands; a killed job loses no more than this."""

    every_minutes: PositiveFloat = Field(10.0, description="at the latest after so many minutes")
    every_iterations: PositiveInt | None = Field(None, description="and after so many iterations")
    folder: str | None = Field(None, description="folder or url for them; default: the stream's own folder")


class TrackingConfig(Section):
    """MLflow. Secrets come from the environment, never from here."""

    uri: str | None = Field(None, description="tracking server or database; default: sqlite in the output folder")
    experiment: str = "avcil"
    artifacts: Literal["full", "reference"] = Field(
        "full", description="what MLflow keeps of a step: its files, or their digests and where they lie"
    )
    artifact_uri: str | None = Field(
        None, description="folder or url that takes the files of `reference`; default: they stay in the stream's folder"
    )
    register_as: str = Field(
        "auto",
        description="name of the final model in the model registry; `auto`: NAME-METHOD; `none`: no registration",
    )
    wait_seconds: PositiveFloat = Field(
        60.0, description="how long the end of a step waits for a server that is away; `avcil sync` makes up for it"
    )

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        if uri and re.search(r"://[^/@]*@", uri):
            raise ValueError("no user or password here; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return uri


class Config(Section):
    """Everything that a run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="of the benchmark; part of the run's name")
    seed: int = Field(0, ge=0)
    output: str = Field("runs", description="folder that takes step artifacts and the tracking database")
    data: DataConfig
    scenario: ScenarioConfig
    model: ModelConfig
    method: MethodConfig
    memory: MemoryConfig = MemoryConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def stream_name(self) -> str:
        """The name of the stream: benchmark, method and seed."""
        return f"{self.name}-{self.method.name}-seed{self.seed}"

    @model_validator(mode="after")
    def _batches_fill_the_ranges(self) -> "Config":
        if self.optim.global_batch % self.data.canonical_nodes:
            raise ValueError(
                f"optim.global_batch={self.optim.global_batch} is not a multiple of "
                f"data.canonical_nodes={self.data.canonical_nodes}; each range gives an equal share of a batch"
            )
        return self

    @model_validator(mode="after")
    def _encoders_agree(self) -> "Config":
        if (self.model.visual.kind == "precomputed") != (self.model.audio.kind == "precomputed"):
            raise ValueError("model.visual and model.audio: both are precomputed, or neither")
        return self

    @model_validator(mode="after")
    def _what_is_augmented_are_clips(self) -> "Config":
        if self.data.augment.is_on and self.model.visual.kind == "precomputed":
            raise ValueError("data.augment varies clips, and features are given; leave it out, or train on clips")
        return self

    @model_validator(mode="after")
    def _transformer_settings_have_one(self) -> "Config":
        trained = [
            encoder
            for encoder in self.model.used
            if isinstance(encoder, TransformerConfig) and encoder.train != "frozen"
        ]
        if self.optim.layer_decay < 1 and not trained:
            raise ValueError(
                f"optim.layer_decay={self.optim.layer_decay} is for the blocks of a transformer, and none is trained; "
                "set train: partial or full in model.visual or model.audio, or optim.layer_decay to 1.0"
            )
        if self.engine.checkpoint_encoders and not trained:
            raise ValueError(
                "engine.checkpoint_encoders=true is for transformers that are trained, and none is; "
                "set train: partial or full in model.visual or model.audio, or engine.checkpoint_encoders to false"
            )
        return self


def _listed(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))
