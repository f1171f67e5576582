"""Settings of the optimizer: update rule, learning-rate schedule, batches, and the epoch that a step keeps."""

from itertools import pairwise
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from avcil_dist.config.section import Fork, Operational, Section


class OptimConfig(Section):
    """Optimization of a step. The defaults are Adam with L2 weight decay and a constant learning rate.

    A global batch is the batch of all ranks together.
    """

    name: Fork[Literal["adam", "adamw", "sgd"]] = Field(
        "adam", description="Update rule: `adam` (weight decay as L2), `adamw` (decoupled weight decay) or `sgd`."
    )
    lr: Fork[PositiveFloat] = Field(1e-3, le=1_000_000, description="Learning rate; the schedule scales it.")
    head_lr: Fork[PositiveFloat | None] = Field(
        None, le=1_000_000, description="Learning rate of the classifier. Default: that of the other parameters, `lr`."
    )
    momentum: Fork[float] = Field(0.9, ge=0, lt=1, description="Momentum of `sgd`.")
    weight_decay: Fork[float] = Field(
        1e-4,
        ge=0,
        le=1_000_000,
        description="Weight decay: added to the gradient (L2) by `adam` and `sgd`, decoupled by `adamw`.",
    )
    decay: Fork[Literal["all", "matrices"]] = Field(
        "all", description="Parameters with weight decay: `all`, or `matrices` only, not biases and norms."
    )
    layer_decay: Fork[float] = Field(
        1.0,
        gt=0,
        le=1,
        description="Learning rate of a transformer block, as a fraction of the learning rate of the next block "
        "towards the output. 1.0: all blocks are equal.",
    )
    schedule: Fork[Literal["constant", "cosine", "linear", "multistep"]] = Field(
        "constant",
        description="Learning rate over a step, after the warm-up: `constant`; `cosine` or `linear` down to "
        "`final_lr_fraction` at the end; `multistep`, times `lr_drop` at each of the `milestones`.",
    )
    warmup_epochs: Fork[NonNegativeFloat] = Field(
        0.0,
        le=1_000_000,
        description="Epochs, or a fraction of one, in which the learning rate increases linearly from 0 to `lr`.",
    )
    final_lr_fraction: Fork[float] = Field(
        0.0, ge=0, le=1, description="Learning rate at the end of `cosine` and `linear`, as a fraction of `lr`."
    )
    milestones: Fork[list[PositiveInt]] = Field(
        [], max_length=1000, description="Epochs, in ascending order, after which `multistep` lowers the learning rate."
    )
    lr_drop: Fork[float] = Field(0.1, gt=0, le=1, description="Factor of the learning rate at each milestone.")
    ema: Fork[float | None] = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the weights, such as 0.999, which is then validated and kept "
        "instead of the last weights (needs ZeRO 0-2). Default: no average.",
    )
    epochs: Fork[PositiveInt] = Field(200, le=1_000_000, description="Number of epochs of a step.")
    global_batch: Fork[PositiveInt] = Field(
        256,
        le=1_000_000,
        description="Number of clips of the current step per global batch. Must be a multiple of the number of ranks "
        "and of data.canonical_nodes.",
    )
    global_replay_batch: Fork[PositiveInt] = Field(
        128,
        le=1_000_000,
        description="Number of exemplars that replay adds to each global batch. Must be a multiple of the number of "
        "ranks.",
    )
    global_eval_batch: Operational[PositiveInt] = Field(
        256,
        le=1_000_000,
        description="Number of clips per global batch of an evaluation, rounded up to a multiple of the "
        "number of ranks.",
    )
    keep_epoch: Fork[Literal["best_val", "last"]] = Field(
        "best_val",
        description="Epoch whose weights become the result of the step: the one with the best validation accuracy, or "
        "the last one.",
    )
    validate_every: Fork[PositiveInt] = Field(
        1,
        le=1_000_000,
        description="Epochs between two validations, if the epoch is selected by them. The last epoch is validated.",
    )
    patience: Fork[PositiveInt | None] = Field(
        None,
        le=1_000_000,
        description="Stop a step after this number of validations in a row without a better accuracy. Default: train "
        "all epochs.",
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> "OptimConfig":
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("schedule=multistep and milestones=[...] belong together; set both, or neither")
        if any(first >= second for first, second in pairwise(self.milestones)):
            raise ValueError(f"milestones={self.milestones} must ascend")
        if self.milestones and self.milestones[-1] >= self.epochs:
            raise ValueError(f"milestone {self.milestones[-1]} is not before the last of epochs={self.epochs}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} must be less than epochs={self.epochs}")
        if self.patience and self.keep_epoch != "best_val":
            raise ValueError(f"patience needs keep_epoch=best_val, it is {self.keep_epoch}")
        return self
