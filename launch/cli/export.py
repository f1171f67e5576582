"""Command `avcil export`: a step's weights for others, with a model card, also in a repository of the hub."""

from typing import TYPE_CHECKING, cast

import click

from launch.cli.output import echo, echo_progress

if TYPE_CHECKING:
    from launch.export import Format


@click.command()
@click.argument("model", metavar="STREAM|MODEL")
@click.option(
    "--format", "kind", type=click.Choice(["safetensors", "onnx", "hub"]), default="safetensors", show_default=True
)
@click.option("--output", "-o", metavar="FOLDER", required=True, help="New folder of the files.")
@click.option("--step", type=click.IntRange(0), help="The step to export; default: the last committed.")
@click.option(
    "--license", "licence", default="unknown", show_default=True, help="Licence of the weights, as the hub names it."
)
@click.option("--push", metavar="OWNER/NAME", help="Upload to this repository of the hub, which is made if needed.")
@click.option("--private", is_flag=True, help="Nobody else sees the new repository of --push.")
@click.option("--manifest", help="Manifest of the clips, where it is not at its former place.")
@click.option("--uri", help="Tracking server of a registered MODEL; default: MLFLOW_TRACKING_URI, else ./runs.")
def export(
    model: str,
    kind: str,
    output: str,
    step: int | None,
    licence: str,
    push: str | None,
    private: bool,
    manifest: str | None,
    uri: str | None,
) -> None:
    """Export a committed step of STREAM, or a registered MODEL, to a new FOLDER, with a model card (README.md).

    \b
    safetensors  weights, config.json, metrics.json; `avcil predict FOLDER clip.mp4` reads it
    hub          the same as a repository of the Hugging Face hub; --push uploads it, with the token in HF_TOKEN
    onnx         model.onnx: inputs of any number of clips to class scores, in float32; compared with the network by
                 onnxruntime before it is kept (needs the extra: pip install 'avcil-dist[export]')

    Exemplars, clips, urls and paths are not exported. A method that predicts by more than the network brings its own
    state: class means (icarl), sums of features (analytic, …), features of the training clips (kernel).

    \b
    Examples:
      avcil export runs/demo-avcil-seed0 -o export --license cc-by-4.0
      avcil export runs/demo-avcil-seed0 --format onnx --step 1 -o graph
      avcil export models:/demo@latest --format hub -o repository --uri http://tracking:5000
      avcil export runs/demo-avcil-seed0 --format hub -o repository --push lab/demo-avcil --private
    """
    from launch.export import check_push, export_model, push_export
    from launch.prediction import ModelRequest

    if push is not None:
        check_push(push, cast("Format", kind))
    request = ModelRequest(model, step=step, manifest=manifest, uri=uri, device="cpu")
    if kind == "onnx":
        echo_progress("writing the graph, and comparing it with the network (large encoders take minutes)")
    done = export_model(request, cast("Format", kind), output, licence)
    echo(f"wrote {output}: step {done.step}, {done.num_classes} classes, {done.size / 1e6:.1f} MB")
    if done.difference is not None:
        echo(f"onnxruntime differs from the network by {done.difference:.1e} of the largest score")
    if push is not None:
        echo_progress(f"uploading to {push}")
        echo(f"uploaded: {push_export(push, output, done.step, is_private=private)}")
