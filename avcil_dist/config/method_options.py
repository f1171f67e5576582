"""Options of the built-in methods. They are apart from the methods, so that reading settings does not import torch.

A method of another package has a class `Options` of its own. A change of an option within a stream makes another
stream, a fork; `Incomparable` are options that the state of earlier steps depends on, such as features of sums.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from avcil_dist.config.section import Incomparable, Section

Share = Annotated[float, Field(ge=0, lt=1)]


class NoOptions(Section):
    """Options of a method that has none."""


class SumsOptions(Section):
    """Features φ."""

    features: Incomparable[Literal["tokens", "network"]] = Field(
        "tokens",
        description="pooled tokens of the encoders (tokens), or features of a network trained at step 0 (network)",
    )
    pool: Incomparable[tuple[PositiveInt, PositiveInt]] = Field(
        (8, 1), description="grid of frames × positions to which visual tokens are pooled"
    )
    unit_length: Incomparable[bool] = Field(
        False, description="scale the sound and each pooled visual token of a clip to length 1"
    )


class RidgeOptions(SumsOptions):
    """Features, and candidates for γ."""

    gammas: list[PositiveFloat] = Field(
        [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6],
        min_length=1,
        description="candidates for γ; the best on validation clips is used, of equally good ones the largest",
    )
    expansion: Incomparable[int] = Field(
        0, ge=0, le=1_000_000, description="length of a fixed random ReLU expansion of φ; 0 for none"
    )
    expansion_seed: Incomparable[int] = Field(0, ge=0)


class LwfOptions(Section):
    """Settings of the distillation."""

    distillation_temperature: PositiveFloat = 2.0


class SsilOptions(Section):
    """Settings of the distillation."""

    distillation_temperature: PositiveFloat = 2.0


class WaOptions(Section):
    """Settings of the distillation."""

    distillation_temperature: PositiveFloat = 2.0


class MemoOptions(Section):
    """Weight of the auxiliary loss, and the shared layers."""

    lambda_auxiliary: float = Field(1.0, ge=0, description="α: weight of the loss of the newest block's own head")
    train_shared: bool = Field(True, description="train the shared layers in all steps; false: at step 0 alone")


class IcarlOptions(Section):
    """Prediction, and the form of the distillation."""

    variant: Literal["released", "paper"] = Field(
        "released",
        description="as in the authors' program (released), which applies the sigmoid twice, or once (paper)",
    )
    predict: Literal["nme", "fc"] = Field("nme", description="nearest mean of exemplars (nme), or the head (fc)")


class AfcOptions(Section):
    """Head, weight of the discrepancy, and prediction."""

    predict: Literal["nme", "lsc"] = Field("nme", description="nearest mean of exemplars (nme), or the head (lsc)")
    num_proxies: PositiveInt = Field(10, le=10_000, description="proxies per class, K")
    lambda_discrepancy: float = Field(
        0.5, ge=0, description="λ; multiplied by the square root of the number of steps so far"
    )


class AvcilOptions(Section):
    """Weights and switches; a term that is switched off is not computed."""

    variant: Literal["released", "paper"] = Field(
        "released", description="divisor of L_C: as in the authors' program (released), or in equation 7 (paper)"
    )
    instance: bool = Field(True, description="instance-aware contrast L_I")
    class_aware: bool = Field(True, description="class-aware contrast L_C")
    attention: bool = Field(True, description="visual attention distillation L_S, L_T")
    lambda_instance: float = Field(0.1, ge=0)
    lambda_class: float = Field(1.0, ge=0)
    lambda_attention: float = Field(0.5, ge=0, le=1, description="λ of λ L_S + (1 − λ) L_T")
    contrast_temperature: PositiveFloat = 0.05
    distillation_temperature: PositiveFloat = 2.0


class AnchoredOptions(Section):
    """Features and scale of the anchor, and the distillation."""

    parts: Incomparable[PositiveInt] = Field(
        8, description="parts of time to which the anchor's visual tokens are pooled"
    )
    scale: PositiveFloat = Field(10.0, description="s, factor of the anchor's scores")
    distillation_temperature: PositiveFloat = 2.0


class DerppOptions(Section):
    """Origin of the logits, and weights of the terms of exemplars."""

    logits: Literal["previous", "stored"] = Field(
        "previous",
        description="logits that exemplars keep: of the previous step's network, or of the step that stored each",
    )
    lambda_logits: float = Field(0.1, ge=0, description="α: weight of the distance to the old logits")
    lambda_labels: float = Field(0.5, ge=0, description="β: weight of the cross-entropy of exemplars")


class FosterOptions(Section):
    """Temperature, balance of rare classes, and the weight of the distillation."""

    distillation_temperature: PositiveFloat = 2.0
    lambda_distillation: float = Field(1.0, ge=0, description="λ: weight of the teacher's distillation into F")
    beta_boosting: Share = Field(0.97, description="β of the class weights w in the cross-entropy of F")
    beta_compression: Share = Field(0.97, description="β of the class weights in the distillation of F")


class SldaOptions(SumsOptions):
    """Features and shrinkage."""

    shrinkage: float = Field(1e-4, gt=0, le=1, description="ε: share of the identity in the covariance")


class AcilOptions(RidgeOptions):
    """Features, expansion, and candidates for γ; the paper has one γ."""

    expansion: Incomparable[int] = Field(
        8192, ge=1, le=1_000_000, description="length of the random ReLU expansion of φ"
    )


class AirOptions(RidgeOptions):
    """Features, expansion, and candidates for γ, which are smaller because each class has the weight 1."""

    gammas: list[PositiveFloat] = Field(
        [10.0**power for power in range(-6, 3)],
        min_length=1,
        description="candidates for γ; the best on validation clips is used, of equally good ones the largest",
    )
    expansion: Incomparable[int] = Field(
        8192, ge=0, le=1_000_000, description="length of a fixed random ReLU expansion of φ; 0 for none"
    )


class AnalyticOptions(RidgeOptions):
    """Features, and the choice of the ridge. The defaults are those of artifacts without these settings."""

    gamma: Literal["evidence", "validation"] = Field(
        "validation",
        description="ridge per block of features from the evidence of the sums (evidence; `method=analytic` sets "
        "it), or one of `gammas` for all features, by validation clips (validation)",
    )


class RanpacOptions(RidgeOptions):
    """Features, length of h, and the candidates for γ of the paper."""

    gammas: list[PositiveFloat] = Field(
        [10.0**power for power in range(-8, 9)],
        min_length=1,
        description="candidates for γ; the best on validation clips is used, of equally good ones the largest",
    )
    expansion: Incomparable[int] = Field(
        10_000, ge=1, le=1_000_000, description="length of the random projection, M in the paper"
    )


class KernelOptions(Section):
    """Features, kernel and limits."""

    pool: Incomparable[tuple[PositiveInt, PositiveInt]] = Field(
        (8, 1), description="grid of frames × positions to which visual tokens are pooled"
    )
    gamma: PositiveFloat = Field(0.01, description="ridge γ")
    visual_weight: float = Field(0.7, gt=0, lt=1, description="w_v; w_a is the rest of 1")
    keep_factor: bool = Field(
        False,
        description="keep the Cholesky factor, 4N² bytes, in the artifact, so that a step only adds its rows; "
        "otherwise a step computes all of it",
    )
    max_clips: PositiveInt = Field(
        20_000,
        le=1_000_000,
        description="limit of N of the exact solution; it takes 16N² bytes on one rank, 6.4 GB at 20,000",
    )
    landmarks: int = Field(
        4096,
        ge=0,
        le=100_000,
        description="m, landmarks of the approximation beyond max_clips; 0: refuse more clips",
    )
    landmark_seed: int = Field(0, ge=0, description="seed of the landmarks")


METHOD_OPTIONS: dict[str, type[Section]] = {
    "acil": AcilOptions,
    "afc": AfcOptions,
    "air": AirOptions,
    "analytic": AnalyticOptions,
    "anchored": AnchoredOptions,
    "avcil": AvcilOptions,
    "bic": WaOptions,
    "derpp": DerppOptions,
    "er": NoOptions,
    "finetune": NoOptions,
    "foster": FosterOptions,
    "icarl": IcarlOptions,
    "joint": NoOptions,
    "kernel": KernelOptions,
    "lwf": LwfOptions,
    "memo": MemoOptions,
    "ncm": SumsOptions,
    "ranpac": RanpacOptions,
    "slda": SldaOptions,
    "ssil": SsilOptions,
    "wa": WaOptions,
}
