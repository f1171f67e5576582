"""Command `avcil eval`: metrics of committed steps, on any split, from one modality, and with noise."""

import json
from typing import TYPE_CHECKING, Any, cast

import click

from launch.cli.options import predicted_clips_options
from launch.cli.output import echo_once, is_main_rank

if TYPE_CHECKING:
    from avcil_dist.inference.predict import Modality


@click.command(name="eval")
@click.argument("stream")
@predicted_clips_options
@click.option("--noise-audio", type=float, metavar="DB", help="White noise in the sound: signal-to-noise ratio in dB.")
@click.option("--noise-visual", type=float, metavar="DB", help="The same in the pictures.")
@click.option(
    "--robustness", is_flag=True, help="Also evaluate each modality alone, and with noise at 20, 10 and 0 dB."
)
@click.option("--all-steps", is_flag=True, help="Also evaluate every step before: the matrix, forgetting, BWT.")
@click.option("--transfer", is_flag=True, help="Also measure the forward transfer (FWT) of the steps before.")
@click.option("--predictions", metavar="FILE", help="Write key, label, prediction and probabilities: .csv or .npz.")
@click.option(
    "--bootstrap",
    "draws",
    type=click.IntRange(0, 1_000_000),
    default=2000,
    show_default=True,
    help="Samples of the source videos for the 95% intervals; 0: none.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of noise and bootstrap.")
@click.option("--format", "kind", type=click.Choice(["json", "table"]), default="json", show_default=True)
def evaluate(
    stream: str,
    modality: str | None,
    noise_audio: float | None,
    noise_visual: float | None,
    seed: int,
    kind: str,
    **options: Any,
) -> None:
    """Evaluate a committed step of STREAM (a folder such as runs/demo/demo-avcil-seed0) again.

    Prints metrics as JSON, or the main ones as tables: accuracy on all seen classes and on each task, top-5, macro mAP,
    Task-IL, accuracy per class, with 95% intervals by bootstrap over source videos. With --modality a method with a
    head for one modality (analytic, ncm, slda, kernel) uses that; the others get zeros as the other input.

    \b
    Examples:
      avcil eval runs/demo-avcil-seed0 --predictions predictions.csv
      avcil eval runs/demo-avcil-seed0 --modality audio
      avcil eval runs/demo-avcil-seed0 --noise-audio 10 --seed 1
      avcil eval runs/demo-avcil-seed0 --robustness --all-steps --format table
    """
    from avcil_dist.inference.step_predictions import Condition, StepRequest
    from launch.evaluation import EvaluationOptions, evaluate_stream, make_noise

    chosen = {name: options.pop(name) for name in ("step", "split", "manifest", "device")}
    condition = Condition(cast("Modality | None", modality), make_noise(noise_audio, noise_visual, seed))
    results = evaluate_stream(
        StepRequest(stream, condition=condition, **chosen), EvaluationOptions(seed=seed, **options)
    )
    if kind == "json":
        echo_once(json.dumps(results, indent=1))
    elif is_main_rank():
        from rich.console import Console

        from avcil_dist.reporting.evaluation_tables import evaluation_tables

        console = Console()
        for table in evaluation_tables(results):
            console.print(table)
