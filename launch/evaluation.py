"""Evaluation of a stream by its committed steps: the requests that an `avcil eval` makes, and their results."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from avcil_dist.data.noise import InputNoise
from avcil_dist.errors import ConfigError
from avcil_dist.inference.evaluation import described, evaluation, stream_evaluation
from avcil_dist.inference.predictions_file import PredictionTable, check_predictions_format, write_predictions
from avcil_dist.inference.step_predictions import Condition, StepPredictions, StepRequest, predict_step
from avcil_dist.inference.transfer import forward_transfer
from avcil_dist.streams.artifact import StepArtifact
from launch.local_worlds import meetings

ROBUSTNESS_DB = (20.0, 10.0, 0.0)
MAX_DB = 200.0
SUMMARY = ("seen_accuracy", "top5_accuracy", "mean_average_precision", "task_il_accuracy", "task_accuracy")


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `avcil eval`, apart from those of the request."""

    draws: int
    seed: int
    robustness: bool = False
    all_steps: bool = False
    transfer: bool = False
    predictions: str | None = None


def evaluate_stream(request: StepRequest, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate a step; with its options, under further conditions, and the steps before it.

    All ranks of a launcher call it; rank 0 writes the file of predictions. Raises as `predict_step` does.
    """
    if options.predictions:
        check_predictions_format(options.predictions)
    worlds = meetings()
    world = next(worlds)
    made = predict_step(request, world)
    if options.predictions and world.is_main:
        write_predictions(options.predictions, PredictionTable.of_step(made))
    results = evaluation(made, draws=options.draws, seed=options.seed)
    if options.robustness:
        conditions = robustness_conditions(made.artifact, options.seed)
        others = (predict_step(replace(request, condition=found), next(worlds)) for found in conditions)
        results["robustness"] = [_summary(other, options) for other in others]
    steps = range(made.artifact.step)
    if options.all_steps:
        earlier = [predict_step(replace(request, step=step), next(worlds)) for step in steps]
        results["all_steps"] = stream_evaluation([*earlier, made])
    if options.transfer:
        gains = [forward_transfer(request, step, next(worlds)) for step in steps]
        known = [gain for gain in gains if gain is not None]
        results["forward_transfer"] = {"by_step": gains, "mean": sum(known) / len(known) if known else None}
    return results


def robustness_conditions(artifact: StepArtifact, seed: int) -> Iterator[Condition]:
    """Yield the conditions of `--robustness`: each modality alone, then noise in one modality, from weak to strong."""
    trained_on = artifact.config.model.modality
    if trained_on == "both":
        yield Condition(modality="audio")
        yield Condition(modality="visual")
    for ratio in ROBUSTNESS_DB:
        if trained_on != "visual":
            yield Condition(noise=InputNoise(audio_db=ratio, seed=seed))
        if trained_on != "audio":
            yield Condition(noise=InputNoise(visual_db=ratio, seed=seed))


def make_noise(audio_db: float | None, visual_db: float | None, seed: int) -> InputNoise | None:
    """Return the noise of the options; None for none. Raises ConfigError for a ratio that is no usual number."""
    for ratio in (audio_db, visual_db):
        if ratio is not None and not abs(ratio) <= MAX_DB:
            raise ConfigError(
                f"--noise-audio, --noise-visual: {ratio} dB; give a number from {-MAX_DB:g} to {MAX_DB:g}"
            )
    return None if audio_db is None and visual_db is None else InputNoise(audio_db, visual_db, seed)


def _summary(made: StepPredictions, options: EvaluationOptions) -> dict[str, Any]:
    """The condition and the main metrics of an evaluation."""
    found = evaluation(made, draws=options.draws, seed=options.seed)
    chosen = {name: found[name] for name in SUMMARY}
    bounds = {"interval": found["intervals"]["seen_accuracy"]} if options.draws else {}
    return {name: described(made)[name] for name in ("modality", "noise")} | chosen | bounds
