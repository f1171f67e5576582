"""Command `avcil attention`: the positions and frames that the sound directs the attention to, step by step."""

from typing import Literal

import click


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="STREAM... CLIP...")
@click.option("--steps", default="all", show_default=True, help="Steps to show: all, or numbers such as 0,3.")
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(dir_okay=False),
    help="File to write: .html (with sound), .png, or .mp4 (frames under heat, with sound).",
)
@click.option(
    "--heat",
    type=click.Choice(["attention", "evidence"]),
    default="attention",
    show_default=True,
    help="Map to show: the attention, mean over channels, or the evidence for a class (attention x token x effect on "
    "the class's score).",
)
@click.option("--class", "class_name", help="Class of the evidence. Default: the predicted class of each step.")
@click.option(
    "--regions",
    type=click.Path(exists=True, dir_okay=False),
    help="Table of sounding regions, as `avcil shards synth` writes it (regions.json): adds the share of the map on "
    "the region.",
)
def attention(
    paths: tuple[str, ...],
    steps: str,
    output: str,
    heat: Literal["attention", "evidence"],
    class_name: str | None,
    regions: str | None,
) -> None:
    """Show where the sound directs the attention of committed steps on clips.

    STREAM is a stream's folder that was trained on clips, CLIP a video file. Streams are shown side by side,
    for example with and without distillation; each has one row for each step.

    \b
    Example:
      avcil attention runs/demo/demo-finetune-seed0 runs/demo/demo-avcil-seed0 \\
        runs/demo/clips/test/class_000/test-000-00000.mp4 -o attention.html
    """
    from rich.console import Console

    from launch.attention import make_figure, print_shares
    from launch.cli.output import echo

    shown = make_figure(paths, steps, output, regions, heat, class_name)
    print_shares(shown, heat, Console())
    echo(f"wrote {output}")
