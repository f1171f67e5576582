"""Commands of data sets that are made elsewhere: `avcil shards import-features`, `import-tars` and `synth`."""

from pathlib import Path
from typing import Literal

import click

from launch.cli.count_bar import CountBar
from launch.cli.output import CONTINUES, echo, interrupt_note
from launch.cli.shards_build import CORES, print_report


@click.command("import-features", short_help="Convert the released features of the benchmarks.")
@click.argument("output")
@click.option("--visual", required=True, type=click.Path(path_type=Path), help="A .npy dict, or HDF5 (.h5).")
@click.option("--audio", required=True, type=click.Path(path_type=Path), help="A .npy dict.")
@click.option("--splits", required=True, type=click.Path(path_type=Path), help="Folder of the published lists.")
@click.option(
    "--frames", default=8, show_default=True, type=click.IntRange(1), help="Number of frames of a clip's tokens."
)
@click.option(
    "--clips-per-shard", default=128, show_default=True, type=click.IntRange(1), help="Clips in a full shard."
)
@interrupt_note(CONTINUES)
def import_features_(output: str, visual: Path, audio: Path, splits: Path, frames: int, clips_per_shard: int) -> None:
    """Import the benchmarks' released features as feature shards (float16) at OUTPUT.

    A .npy dict is copied to a temporary file of half its size (in TMPDIR), HDF5 is read clip by clip: neither is
    kept in memory. No code in the pickled files is run.

    Example: avcil shards import-features s3://bucket/ave --visual visual_features.npy --audio audio_features.npy
    --splits lists/AVE
    """
    from data_shards.importers.released_features import import_features

    with CountBar("reading files (MiB)") as reading, CountBar("importing features") as bar:
        report = import_features(
            visual,
            audio,
            splits,
            output,
            frames=frames,
            clips_per_shard=clips_per_shard,
            digest_progress=reading.show,
            progress=bar.show,
        )
    print_report(report)


@click.command("import-tars", short_help="Use tars of one class each as they are.")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--output", required=True, help="The manifest to write, in a folder above its tars.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Split of shards whose metadata has none.")
@click.option(
    "--classes", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="File of class names, one per line."
)
@click.option(
    "--processes", default=CORES, show_default=True, type=click.IntRange(1), help="Number of processes that read."
)
def import_tars_(
    urls: tuple[str, ...],
    output: str,
    split: Literal["train", "val", "test"] | None,
    classes: Path | None,
    processes: int,
) -> None:
    """Import WebDataset tars by writing their manifest: KEY.mp4 beside KEY.json (label, split) or KEY.cls.

    Each tar is read once and must hold one split of one class; `avcil shards repack` takes other tars. With --classes
    the numbers of classes, counted from 0, get names.

    Example: avcil shards import-tars s3://bucket/others/dog-*.tar --split train --output s3://bucket/others/manifest.json
    """
    from data_shards.importers.webdataset_tars import import_tars
    from data_shards.listings.listing import read_class_names
    from data_shards.tar_files import expand_urls

    names = read_class_names(classes) if classes else []
    with CountBar("reading shards") as bar:
        manifest = import_tars(
            expand_urls(urls), output, split=split, classes=names, processes=processes, progress=bar.show
        )
    clips = sum(shard.count for shard in manifest.shards)
    echo(f"{output}: written: {clips} clips, {len(manifest.classes)} classes, {len(manifest.shards)} shards")


@click.command(short_help="Render labelled clips with sound.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--classes", default=8, show_default=True, type=click.IntRange(1), help="Number of classes.")
@click.option("--train", default=40, show_default=True, type=click.IntRange(0), help="Training clips per class.")
@click.option("--val", default=8, show_default=True, type=click.IntRange(0), help="Validation clips per class.")
@click.option("--test", default=10, show_default=True, type=click.IntRange(0), help="Test clips per class.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of a clip in seconds.")
@click.option("--size", default=64, show_default=True, help="Width and height of the video in pixels (even).")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--hard", is_flag=True, help="Classes share looks and tones; only both together are a class. More noise.")
@click.option(
    "--processes", default=CORES, show_default=True, type=click.IntRange(1), help="Number of processes that render."
)
@interrupt_note(CONTINUES)
def synth(
    folder: Path,
    classes: int,
    train: int,
    val: int,
    test: int,
    seconds: float,
    size: int,
    seed: int,
    hard: bool,
    processes: int,
) -> None:
    """Render a labelled audio-visual data set of mp4 files into FOLDER.

    In each clip one pulsing shape makes the tone of its class, among silent shapes of other classes. Existing clips
    are kept. Build shards from FOLDER/clips.csv afterwards.

    Example: avcil shards synth runs/clips --classes 8 --train 40
    """
    from data_shards.synthetic import SyntheticSpec, render_dataset

    clips = {"train": train, "val": val, "test": test}
    spec = SyntheticSpec(num_classes=classes, clips=clips, seconds=seconds, size=size, seed=seed, hard=hard)
    with CountBar("rendering clips") as bar:
        path = render_dataset(folder, spec, progress=lambda: bar.advance(spec.num_clips), processes=processes)
    echo(f"{path}: {spec.num_clips} clips of {classes} classes; next: avcil shards build {path} OUTPUT")
