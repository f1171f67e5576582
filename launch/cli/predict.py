"""Command `avcil predict`: the predicted class of each clip, as csv."""

import csv
import io
from typing import cast

import click

from launch.cli.output import echo_once, is_main_rank


@click.command()
@click.argument("stream")
@click.argument("output", type=click.Path(dir_okay=False))
@click.option("--step", type=int, help="The step whose weights predict; default: the last committed.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option("--manifest", help="Manifest of other shards than those that the step was trained on.")
@click.option("--modality", type=click.Choice(["audio", "visual"]), help="Predict from sound, or from pictures, alone.")
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="As engine.device."
)
def predict(
    stream: str, output: str, step: int | None, split: str, manifest: str | None, modality: str | None, device: str
) -> None:
    """Write the predicted class of each clip of the seen classes to OUTPUT, a csv file: clip, class, predicted.

    The lines are in the order of the manifest, so two streams of the same data can be compared clip by clip. A damaged
    clip has no prediction. --modality is as in `avcil eval --missing` with the other modality.
    """
    from avcil_dist import storage
    from avcil_dist.data.manifest import Split
    from avcil_dist.inference.predict import Modality, predict_step
    from avcil_dist.training.device import DeviceSetting
    from launch.local_worlds import current_world

    missing = {"audio": "visual", "visual": "audio", None: None}[modality]
    made = predict_step(
        stream,
        step,
        cast(Split, split),
        manifest,
        world=current_world(),
        missing=cast(Modality | None, missing),
        device_setting=cast(DeviceSetting, device),
    )
    if is_main_rank():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("clip", "class", "predicted"))
        writer.writerows(made.rows())
        storage.write_bytes(output, text.getvalue().encode())
    echo_once(f"wrote {output}: {len(made.predicted.clips)} clips, accuracy {made.predicted.accuracy:.4f}")
