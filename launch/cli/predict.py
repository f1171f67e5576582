"""Command `avcil predict`: the predicted class of each clip, as csv."""

from typing import TYPE_CHECKING, Any, cast

import click

from launch.cli.options import predicted_clips_options
from launch.cli.output import echo_once, is_main_rank

if TYPE_CHECKING:
    from avcil_dist.inference.predict import Modality


@click.command()
@click.argument("stream")
@click.argument("output", type=click.Path(dir_okay=False))
@predicted_clips_options
def predict(stream: str, output: str, modality: str | None, **options: Any) -> None:
    """Write the predicted class of each clip of the seen classes to OUTPUT, a csv file: clip, class, predicted."""
    from avcil_dist.inference.predictions_file import PredictionTable, check_predictions_format, write_predictions
    from avcil_dist.inference.step_predictions import Condition, StepRequest, predict_step
    from launch.local_worlds import current_world

    check_predictions_format(output)
    condition = Condition(cast("Modality | None", modality))
    made = predict_step(StepRequest(stream, condition=condition, **options), current_world())
    if is_main_rank():
        write_predictions(output, PredictionTable.of_step(made))
    echo_once(f"wrote {output}: {len(made.keys)} clips, accuracy {made.predicted.accuracy:.4f}")
