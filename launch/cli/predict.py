"""Command `avcil predict`: the classes of media files, or of the clips of a data set."""

import json
import sys
from typing import TYPE_CHECKING, Any, cast

import click

from avcil_dist.errors import ConfigError
from avcil_dist.exit_codes import PARTIAL, USER_ERROR
from launch.cli.options import predicted_clips_options
from launch.cli.output import echo, echo_error, echo_once, is_main_rank

if TYPE_CHECKING:
    from avcil_dist.inference.media import ScoredFile
    from avcil_dist.inference.predict import Modality
    from launch.prediction import ModelRequest

COMMANDLINE = click.core.ParameterSource.COMMANDLINE
OF_CLIPS = {name: f"--{name}" for name in ("top", "encoders", "workers", "uri")} | {"as_json": "--json"}
OF_SPLITS = {"split": "--split"}


@click.command()
@click.argument("model", metavar="STREAM|MODEL")
@click.argument("clips", nargs=-1, metavar="[CLIP]...")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Classes to print per clip.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: clips, classes with probability and score, faults.")
@click.option("--output", "-o", metavar="FILE", help="Write prediction and probabilities of all classes: .csv or .npz.")
@click.option("--encoders", metavar="CONFIG", help="Configuration of the encoders, for a model of features.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode.  [default: each core, 0 for few clips]")
@click.option("--uri", help="Tracking server of a registered MODEL; default: MLFLOW_TRACKING_URI, else ./runs.")
@predicted_clips_options
def predict(
    model: str,
    clips: tuple[str, ...],
    modality: str | None,
    device: str,
    split: str,
    output: str | None,
    **options: Any,
) -> None:
    """Predict the class of each CLIP by a committed step of STREAM, or by a registered MODEL.

    CLIP is a video file, a folder of them, or a csv with a column path (and start, duration, in seconds). A stream that
    was trained on features encodes the clips with the encoders that the manifest of the features records. Without
    CLIPs, the clips of --split of the stream's data set are predicted and written to --output.

    A clip that cannot be read or decoded is named on standard error and left out. Exit code: 0 if every clip was
    predicted, 3 if some were left out, 2 if all were, or for any other error.

    \b
    Examples:
      avcil predict runs/demo-avcil-seed0 clip.mp4 --top 5
      avcil predict runs/demo-avcil-seed0 videos/ more.csv --json
      avcil predict models:/demo@latest videos/ --output predictions.csv --uri http://tracking:5000
      avcil predict runs/demo-avcil-seed0 --split val --output predictions.csv
    """
    from avcil_dist.inference.predictions_file import check_predictions_format

    if output:
        check_predictions_format(output)
    _refuse(OF_SPLITS if clips else OF_CLIPS, "with CLIPs" if clips else "without CLIPs")
    if not clips:
        _predict_split(model, output, modality=modality, device=device, split=split, **options)
        return
    if not is_main_rank():
        return
    from launch.prediction import ModelRequest

    chosen = {name: options[name] for name in ("step", "manifest", "encoders", "uri")}
    request = ModelRequest(model, modality=cast("Modality | None", modality), device=cast(Any, device), **chosen)
    _predict_clips(request, clips, output, options["top"], options["as_json"], options["workers"])


def _refuse(names: dict[str, str], where: str) -> None:
    """Raise ConfigError for options of the other form of the command that were given."""
    context = click.get_current_context()
    given = [word for name, word in names.items() if context.get_parameter_source(name) is COMMANDLINE]
    if given:
        raise ConfigError(f"{', '.join(given)}: of no use {where}; leave it out")


def _predict_split(
    stream: str, output: str | None, *, modality: str | None, step: int | None, manifest: str | None, **options: Any
) -> None:
    """Predict the clips of a split, by all ranks, and write them."""
    from avcil_dist.inference.predictions_file import PredictionTable, write_predictions
    from avcil_dist.inference.step_predictions import Condition, StepRequest, predict_step
    from launch.local_worlds import current_world

    if output is None:
        raise ConfigError("give CLIPs, or --output FILE for the predictions of the data set's clips")
    condition = Condition(cast("Modality | None", modality))
    request = StepRequest(stream, step, options["split"], manifest, condition, options["device"])
    made = predict_step(request, current_world())
    if is_main_rank():
        write_predictions(output, PredictionTable.of_step(made))
    echo_once(f"wrote {output}: {len(made.keys)} clips, accuracy {made.predicted.accuracy:.4f}")


def _predict_clips(
    request: "ModelRequest", clips: tuple[str, ...], output: str | None, top: int, as_json: bool, workers: int | None
) -> None:
    """Predict media files, print the results, and end with the exit code of the command."""
    from avcil_dist.inference.predictions_file import PredictionTable, write_predictions
    from launch.prediction import fault_line, find_files, load_predictor, shown_classes, stacked, top_classes

    files = find_files(clips)
    media = load_predictor(request, len(files), workers)
    classes = media.predictor.classes
    done: list[ScoredFile] = []
    for found in media.score(files):
        done.append(found)
        if found.scores is None:
            echo_error(fault_line(found))
        elif not as_json:
            echo(shown_classes(found.name, top_classes(found, classes, top)))
    good = [found for found in done if found.scores is not None]
    if as_json:
        predictions = [{"clip": found.name, "classes": top_classes(found, classes, top)} for found in good]
        faults = [{"clip": found.name, "fault": found.fault} for found in done if found.scores is None]
        echo(json.dumps({"predictions": predictions, "faults": faults}, indent=1))
    if output:
        names = [found.name for found in done]
        write_predictions(output, PredictionTable(names, None, classes, stacked(done, len(classes))))
        echo(f"wrote {output}: {len(good)} of {len(done)} clips", err=as_json)
    if len(good) < len(done):
        echo_error(f"{len(done) - len(good)} of {len(done)} clips were left out")
        sys.exit(PARTIAL if good else USER_ERROR)
