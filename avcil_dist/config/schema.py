"""Schema of the configuration: every setting with its type, default, description and class of change.

The encoders' settings are in `encoders.py`, those of the optimizer in `optim.py`, of snapshots in `snapshot.py`, the
classes of change in `section.py`. `loader.py` reads files and overrides.
"""

from typing import Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from avcil_dist.config.encoders import ModelConfig, trained_part
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.section import Fork, Incomparable, Operational, PathText, Section
from avcil_dist.config.snapshot import SnapshotConfig
from avcil_dist.system.plugins import label

Precision = Literal["float32", "bf16", "fp16"]


class ClipConfig(Section):
    """Conversion of a raw clip to tensors. The defaults are those of VideoMAE and AudioMAE."""

    frames: Incomparable[PositiveInt] = Field(
        16, le=4096, description="Number of frames, sampled evenly over the clip."
    )
    size: Incomparable[PositiveInt] = Field(224, le=4096, description="Height and width of a frame, in pixels.")
    sample_rate: Incomparable[PositiveInt] = Field(
        16_000, le=768_000, description="Rate that audio is resampled to, in Hz."
    )
    mel_bins: Incomparable[PositiveInt] = Field(128, le=4096, description="Number of bins of the log-mel filterbank.")
    mel_frames: Incomparable[PositiveInt] = Field(
        1024,
        le=1_000_000,
        description="Number of filterbank frames of 10 ms. Longer audio is cut, shorter audio is padded.",
    )
    mel_mean: Incomparable[float] = Field(
        -4.2677393,
        ge=-1_000_000,
        le=1_000_000,
        description="Mean of the filterbank. The normalised value is (x - mel_mean) / (2 * mel_std).",
    )
    mel_std: Incomparable[PositiveFloat] = Field(
        4.5689974, le=1_000_000, description="Standard deviation of the filterbank; see mel_mean."
    )
    silent: Incomparable[Literal["error", "silence"]] = Field(
        "error",
        description="Treatment of a clip without an audio track: `error` (a damaged clip) or `silence` (zeros).",
    )


class AugmentConfig(Section):
    """Random augmentation of training clips, equal for all frames of a clip. The defaults switch it off."""

    crop: Fork[float] = Field(
        1.0, gt=0, le=1, description="Minimum area of a random resized crop, as a fraction of the frame. 1.0: no crop."
    )
    flip: Fork[float] = Field(0.0, ge=0, le=1, description="Probability of a horizontal flip.")
    brightness: Fork[float] = Field(
        0.0, ge=0, le=1, description="Maximum relative change of brightness (torchvision ColorJitter). 0: none."
    )
    contrast: Fork[float] = Field(0.0, ge=0, le=1, description="Maximum relative change of contrast. 0: none.")
    saturation: Fork[float] = Field(0.0, ge=0, le=1, description="Maximum relative change of saturation. 0: none.")
    hue: Fork[float] = Field(
        0.0, ge=0, le=0.5, description="Maximum shift of hue, as a fraction of the colour circle. 0: none."
    )
    time_mask: Fork[int] = Field(
        0, ge=0, description="Upper bound (exclusive) of the random number of masked filterbank frames (SpecAugment)."
    )
    mel_mask: Fork[int] = Field(
        0, ge=0, description="Upper bound (exclusive) of the random number of masked filterbank bins (SpecAugment)."
    )

    @property
    def is_on(self) -> bool:
        """Whether any augmentation is applied."""
        return self != AugmentConfig()


class LimitConfig(Section):
    """Subset of the data set: the first clips of each class. The defaults take all of them."""

    train: Incomparable[PositiveInt | None] = Field(None, description="Maximum number of training clips of a class.")
    val: Incomparable[PositiveInt | None] = Field(None, description="Maximum number of validation clips of a class.")
    test: Incomparable[PositiveInt | None] = Field(None, description="Maximum number of test clips of a class.")


class DataConfig(Section):
    """Clips and how they are read."""

    manifest: Operational[PathText] = Field(
        description="Path or url of manifest.json. Its content hash identifies the data set; its location may change."
    )
    made_by: Operational[str | None] = Field(
        None, description="Command that makes the data, for the error of a missing manifest."
    )
    shuffle_window: Fork[PositiveInt] = Field(
        16,
        description="Number of shards whose clips are shuffled together, per range (see canonical_nodes). Only these "
        "shards must be on the local disk.",
    )
    canonical_nodes: Fork[PositiveInt] = Field(
        1,
        le=65_536,
        description="Number of ranges that the training clips are divided into. Every global batch takes an equal "
        "share of each range, on any number of machines. A multiple of the number of machines lets each machine read "
        "only its own ranges; optim.global_batch must be a multiple of this number.",
    )
    decode_workers: Operational[int] = Field(
        1,
        ge=0,
        le=256,
        description="Number of decoding processes per rank. A clip that crashes its decoder ends such a process, is "
        "skipped, counted and named. 0: the process of the rank decodes, and such a clip ends the step.",
    )
    read_threads: Operational[PositiveInt] = Field(8, le=1024, description="Number of concurrent reads per rank.")
    shard_cache: Operational[PathText] = Field(
        "auto",
        description="Folder on the local disk whose subfolder `avcil-shards` caches whole shards, shared by the "
        "processes of a node. `auto`: a folder below TMPDIR for remote shards, no cache for local ones. `none`: range "
        "requests, no cache.",
    )
    shard_cache_gigabytes: Operational[PositiveFloat] = Field(
        50.0,
        le=1_000_000_000,
        description="Maximum size of the shard cache, in GB. Shards that do not fit are read by range requests.",
    )
    clip_cache: Operational[Literal["auto", "device", "host", "none"]] = Field(
        "auto",
        description="Location of the cache of decoded clips or features, which serves all epochs after the first: "
        "`device` (GPU memory), `host` (memory shared by the processes of a node) or `none`. `auto`: the fastest one "
        "that has room for the clips of the step.",
    )
    prefetch_shards: Operational[PositiveInt] = Field(
        2, le=65_536, description="Number of shards that are fetched into the shard cache before their first use."
    )
    retry_seconds: Operational[PositiveFloat] = Field(
        300.0, le=10_000_000, description="Time limit for the retries of a failing remote read, in seconds."
    )
    max_bad_fraction: Fork[float] = Field(
        0.01, ge=0, le=1, description="Maximum fraction of damaged clips in an epoch; more of them stop the step."
    )
    source_disjoint: Incomparable[bool] = Field(
        False,
        description="Also report the accuracy on the test clips whose source video (the key up to its last _) is not "
        "the source of any training clip.",
    )
    clip: ClipConfig = ClipConfig()
    augment: AugmentConfig = AugmentConfig()
    limit: LimitConfig = LimitConfig()

    @model_validator(mode="after")
    def _check_masks(self) -> "DataConfig":
        for mask, size in (("time_mask", "mel_frames"), ("mel_mask", "mel_bins")):
            longest, whole = getattr(self.augment, mask), getattr(self.clip, size)
            if longest > whole:
                raise ValueError(f"augment.{mask}={longest} is more than clip.{size}={whole}")
        return self


class ScenarioConfig(Section):
    """Class stream: the order of the classes and its partition into steps."""

    classes_per_step: Incomparable[PositiveInt | list[PositiveInt]] = Field(
        description="Number of classes of every step, or a list with the number of each step."
    )
    classes: Incomparable[list[str] | None] = Field(
        None, description="Classes in their order of arrival. Default: all classes, in the order of the manifest."
    )
    shuffle_seed: Incomparable[int | None] = Field(
        None, description="Seed of a random class order. Default: the order is not shuffled."
    )
    imbalance: Incomparable[float | None] = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Long-tailed stream: ratio of the largest to the smallest share of its training clips that a class "
        "keeps, with an exponential profile over a random order of the classes. Default: all clips.",
    )
    blur: Incomparable[float] = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training clips of each class that arrive in the step after the others, among the "
        "clips of its new classes. Those of the last step arrive in time. 0: none.",
    )
    stream_seed: Incomparable[int] = Field(0, ge=0, description="Seed of imbalance and blur.")


class MethodConfig(Section):
    """Method by name, and its options: `config/method_options.py`, or the class `Options` of a plug-in."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Incomparable[str] = Field(
        description="Name of the method; `avcil methods` lists them. Or a class of your own, as `package.module:Class`."
    )

    @property
    def label(self) -> str:
        """Name of the method as part of the names of files and models."""
        return label(self.name)


class MemoryConfig(Section):
    """Exemplar memory, divided evenly among the seen classes."""

    size: Fork[int] = Field(
        0, ge=0, description="Maximum number of exemplars of all classes together. 0: no exemplars."
    )
    selection: Fork[Literal["published", "random", "herding"]] = Field(
        "published",
        description="Selection of the exemplars of a class: `random`, `herding` (the running mean of the features is "
        "closest to the mean of the class) or `published` (the selection of the method's paper).",
    )


class EngineConfig(Section):
    """Execution of a step on the given machines."""

    device: Operational[Literal["auto", "cuda", "cpu"]] = Field(
        "auto",
        description="Device of the ranks. `auto`: a GPU for each, and the processor only where no GPU was given and "
        "the machine has none. `cuda`: a GPU for each. `cpu`: the processor.",
    )
    zero_stage: Operational[Literal[0, 1, 2, 3]] = Field(0, description="DeepSpeed ZeRO stage.")
    precision: Fork[Precision] = Field(
        "float32", description="Precision of the networks. Weights, losses and optimizer state stay float32."
    )
    micro_batch: Operational[PositiveInt | None] = Field(
        None,
        description="Maximum number of clips of a rank in one forward pass. The gradient of a larger batch is "
        "accumulated without approximation. Default: the whole batch of the rank.",
    )
    max_grad_norm: Fork[PositiveFloat | None] = Field(
        None,
        le=1_000_000_000,
        description="Maximum norm of the whole gradient (gradient clipping). Default: no clipping.",
    )
    activation_checkpointing: Operational[bool] = Field(
        False,
        description="Recompute the activations of trained transformers in the backward pass instead of storing them: "
        "less memory, more time.",
    )
    offload: Operational[Literal["none", "optimizer", "parameters"]] = Field(
        "none",
        description="State that is kept in host memory: `optimizer` (needs ZeRO 1-3), or `parameters` too (needs "
        "ZeRO 3).",
    )
    teacher: Operational[Literal["replicated", "sharded"]] = Field(
        "replicated", description="Placement of the teacher: whole on every rank, or sharded over ranks (needs ZeRO 3)."
    )
    attention: Operational[Literal["auto", "torch"]] = Field(
        "auto",
        description="Kernels of the attention. `auto`: the fastest for the device (compiled C++ on CPU, Triton on "
        "GPU). `torch`: plain torch.",
    )
    timeout_minutes: Operational[PositiveFloat] = Field(
        30.0,
        le=1_000_000,
        description="Timeout of a collective, in minutes. A rank that waits longer for others stops the step.",
    )
    meeting_minutes: Operational[PositiveFloat] = Field(
        10.0,
        le=1_000_000,
        description="Time limit for all ranks of a step to be there, in minutes. Then the step stops, and names the "
        "ranks that did not come.",
    )

    @model_validator(mode="after")
    def _check_stage(self) -> "EngineConfig":
        stages = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "parameters": (3,)}[self.offload]
        if self.zero_stage not in stages:
            raise ValueError(f"offload={self.offload} needs zero_stage {_listed(stages)}, it is {self.zero_stage}")
        if self.teacher == "sharded" and self.zero_stage != 3:
            raise ValueError(f"teacher=sharded needs zero_stage 3, it is {self.zero_stage}; use teacher=replicated")
        return self


class TrackingConfig(Section):
    """Tracking with MLflow. Secrets belong in environment variables, never in the configuration."""

    uri: Operational[str | None] = Field(
        None,
        description="Tracking server or database. Default: the variable MLFLOW_TRACKING_URI, else an SQLite database "
        "in the output folder.",
    )
    experiment: Operational[str] = Field(
        "avcil",
        description="Name of the MLflow experiment of a new stream; a stream stays in the one that has its run.",
    )
    trackers: Operational[list[str]] = Field(
        [],
        max_length=10,
        description="Trackers beside MLflow: `tensorboard` and `wandb` write files in the folder of the stream (extras "
        "of the same names); or a plug-in.",
    )
    artifacts: Operational[Literal["full", "reference"]] = Field(
        "full",
        description="Artifacts of a step in MLflow: `full` uploads its files, `reference` logs their digests and "
        "location.",
    )
    artifact_uri: Operational[PathText | None] = Field(
        None,
        description="Folder or url that the files of artifacts=reference are copied to. Default: they stay in the "
        "folder of the stream.",
    )
    register_as: Operational[str] = Field(
        "auto",
        description="Name of the final model in the model registry. `auto`: NAME-METHOD, of `name` and `method.name`. "
        "`none`: the model is not registered.",
    )
    every: Operational[PositiveInt] = Field(20, description="Iterations between two values of loss, speed and memory.")
    system_seconds: Operational[PositiveFloat | None] = Field(
        10.0, le=1_000_000, description="Seconds between two measurements of each machine's load; null: none."
    )
    wait_seconds: Operational[PositiveFloat] = Field(
        60.0,
        le=1_000_000,
        description="Time limit for an unreachable server at the end of a step, in seconds. `avcil sync` sends the "
        "remaining events later.",
    )


class Config(Section):
    """Complete configuration of a stream."""

    name: Fork[str] = Field(
        pattern=r"^[A-Za-z0-9_-]+$",
        max_length=128,
        description="Name of the benchmark. The stream is named NAME-METHOD-seedSEED.",
    )
    seed: Fork[int] = Field(0, ge=0, description="Seed of all random choices but the class order.")
    output: Operational[PathText] = Field(
        "runs", description="Folder or url of the step artifacts, and of the default tracking database."
    )
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
        """Name of the stream: benchmark, method and seed."""
        return f"{self.name}-{self.method.label}-seed{self.seed}"

    @model_validator(mode="after")
    def _check_global_batch(self) -> "Config":
        if self.optim.global_batch % self.data.canonical_nodes:
            raise ValueError(
                f"optim.global_batch={self.optim.global_batch} is not a multiple of "
                f"data.canonical_nodes={self.data.canonical_nodes}; each range gives an equal share of a batch"
            )
        return self

    @model_validator(mode="after")
    def _check_encoder_kinds(self) -> "Config":
        if (self.model.visual.kind == "precomputed") != (self.model.audio.kind == "precomputed"):
            raise ValueError("model.visual and model.audio: both are precomputed, or neither")
        return self

    @model_validator(mode="after")
    def _check_augment(self) -> "Config":
        if self.data.augment.is_on and self.model.visual.kind == "precomputed":
            raise ValueError("data.augment applies to clips, not to precomputed features; remove it, or train on clips")
        return self

    @model_validator(mode="after")
    def _check_average(self) -> "Config":
        if self.optim.ema is not None and self.engine.zero_stage == 3:
            raise ValueError("optim.ema needs the whole weights on every rank; set engine.zero_stage to 2 or less")
        return self

    @model_validator(mode="after")
    def _check_transformer_settings(self) -> "Config":
        trained = [encoder for encoder in self.model.used if trained_part(encoder) not in (None, "frozen")]
        if self.optim.layer_decay < 1 and not trained:
            raise ValueError(
                f"optim.layer_decay={self.optim.layer_decay} needs a trained transformer, and none is trained; "
                "set train: partial, adapters or full in model.visual or model.audio, or optim.layer_decay to 1.0"
            )
        if self.engine.activation_checkpointing and not trained:
            raise ValueError(
                "engine.activation_checkpointing=true needs a trained transformer, and none is trained; "
                "set train: partial, adapters or full in model.visual or model.audio, or "
                "engine.activation_checkpointing to false"
            )
        return self


def _listed(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))
