"""Commands `avcil shards …`: build, import, verify and list shards. The work is done by the package `data_shards`."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import click
from rich.console import Console

from avcil_dist.errors import ConfigError, DataError
from launch.cli.count_bar import CountBar

if TYPE_CHECKING:
    from data_shards.build_plan import BuildReport
    from data_shards.verify import TableRow

CORES = len(os.sched_getaffinity(0))


def _print_report(report: "BuildReport") -> None:
    """Print the data set and its rejected clips."""
    from data_shards.rejections import rejection_table

    manifest = report.manifest
    clips = sum(shard.count for shard in manifest.shards)
    state = "unchanged, built before from the same clips" if report.unchanged else "written"
    click.echo(
        f"{report.manifest_url}: {state}: {clips} clips, {len(manifest.classes)} classes, {len(manifest.shards)} shards"
    )
    if report.rejected:
        Console(stderr=True).print(rejection_table(report.rejected))
        click.echo(f"{len(report.rejected)} clips rejected; rejected.csv lists them with their reasons", err=True)


class _BuildSettings(TypedDict):
    """Arguments of a whole build and of a part."""

    clips_per_shard: int
    min_seconds: float
    keep_muted: bool
    videos: Path | None
    processes: int


@click.group()
def shards() -> None:
    """Build, import, verify and list the shards that training reads."""


@shards.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--classes", default=8, show_default=True, type=click.IntRange(1), help="Number of classes.")
@click.option("--train", default=40, show_default=True, type=click.IntRange(0), help="Training clips per class.")
@click.option("--val", default=8, show_default=True, type=click.IntRange(0), help="Validation clips per class.")
@click.option("--test", default=10, show_default=True, type=click.IntRange(0), help="Test clips per class.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of a clip in seconds.")
@click.option("--size", default=64, show_default=True, help="Width and height of the video in pixels (even).")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option(
    "--processes", default=CORES, show_default=True, type=click.IntRange(1), help="Number of processes that render."
)
def synth(
    folder: Path, classes: int, train: int, val: int, test: int, seconds: float, size: int, seed: int, processes: int
) -> None:
    """Render a labelled audio-visual data set of mp4 files into FOLDER.

    In each clip one pulsing shape makes the tone of its class, among silent shapes of other classes. Existing clips
    are kept. Build shards from FOLDER/clips.csv afterwards.

    Example: avcil shards synth runs/clips --classes 8 --train 40
    """
    from data_shards.synthetic import SyntheticSpec, render_dataset

    clips = {"train": train, "val": val, "test": test}
    spec = SyntheticSpec(num_classes=classes, clips=clips, seconds=seconds, size=size, seed=seed)
    with CountBar("rendering clips") as bar:
        path = render_dataset(folder, spec, progress=lambda: bar.advance(spec.num_clips), processes=processes)
    click.echo(f"{path}: {spec.num_clips} clips of {classes} classes; next: avcil shards build {path} OUTPUT")


@shards.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output")
@click.option(
    "--videos", type=click.Path(path_type=Path), help="Folder of the video files, for a SOURCE that names videos by id."
)
@click.option(
    "--clips-per-shard", default=256, show_default=True, type=click.IntRange(1), help="Clips in a full shard."
)
@click.option("--min-seconds", default=0.5, show_default=True, type=click.FloatRange(0), help="Reject shorter clips.")
@click.option("--keep-muted", is_flag=True, help="Take clips whose sound is all zeros; by default they are rejected.")
@click.option(
    "--processes",
    default=CORES,
    show_default=True,
    type=click.IntRange(1),
    help="Number of processes that check clips.",
)
@click.option("--part", metavar="I/N", help="Build the I-th of N parts only; run merge when all are done.")
@click.option("--strict", is_flag=True, help="A rejected clip is an error: no manifest is written.")
def build(
    source: Path,
    output: str,
    videos: Path | None,
    clips_per_shard: int,
    min_seconds: float,
    keep_muted: bool,
    processes: int,
    part: str | None,
    strict: bool,
) -> None:
    """Build shards and OUTPUT/manifest.json from the clips of SOURCE. OUTPUT is a folder or url (s3://...).

    SOURCE is one of these; its form is recognised:

    \b
      clips.csv            header path,label,split and any of start,duration,source;
                           paths relative to the csv; start and duration cut out a part
      FOLDER               FOLDER/<split>/<class>/*.mp4, or FOLDER/<class>/*.mp4 (split by hash)
      vggsound.csv         or VGGSound's train.csv and test.csv; 10 training clips per class
                           become val; needs --videos, as all below
      Annotations.txt      of AVE, with its trainSet.txt, valSet.txt, testSet.txt beside it
      FOLDER of lists      all_classId_vid_dict.npy and its two companions, as published

    Files in the folder tree of --videos have the names ID_000030.mp4, ID_30000_40000.mp4, ID_000030_000040.mp4, or
    ID.mp4, in any container. Of the last, VGGSound's ten seconds are cut out: copied where a key frame allows it,
    otherwise encoded again. In FOLDER, files without the ending of a video are passed over and counted.

    Every clip is decoded once. Clips that are missing, damaged, silent, too short, no mp4 or duplicate are left out and
    listed with the reason in OUTPUT/rejected.csv. An interrupted build continues when it is started again. An OUTPUT
    with a manifest is never overwritten; with the same clips and settings it is left unchanged.

    \b
    Examples:
      avcil shards build runs/clips/clips.csv runs/shards
      avcil shards build vggsound.csv s3://bucket/vggsound --videos ~/vggsound --min-seconds 9
      avcil shards build vggsound.csv s3://bucket/vggsound --videos /data/vggsound --part $SLURM_ARRAY_TASK_ID/64
    """
    from data_shards.build import build_part, build_shards
    from data_shards.build_plan import Part

    settings = _BuildSettings(
        clips_per_shard=clips_per_shard,
        min_seconds=min_seconds,
        keep_muted=keep_muted,
        videos=videos,
        processes=processes,
    )
    with CountBar("building shards") as bar:
        if part is None:
            report = build_shards(source, output, strict=strict, progress=bar.show, **settings)
        else:
            if strict:
                raise ConfigError("--strict: a part writes no manifest; give --strict to avcil shards merge")
            unchanged = build_part(source, output, Part.parse(part), progress=bar.show, **settings)
            if unchanged is None:
                click.echo(f"{output}: part {part} is done; when all parts are done: avcil shards merge {output}")
                return
            report = unchanged
    _print_report(report)


@shards.command()
@click.argument("output")
@click.option("--strict", is_flag=True, help="A rejected clip is an error: no manifest is written.")
def merge(output: str, strict: bool) -> None:
    """Write OUTPUT/manifest.json when all parts of a build, or of features, are done.

    It equals the manifest of a single build. The error for missing parts names the first missing shard.

    Example: avcil shards merge s3://bucket/vggsound
    """
    from data_shards.build_plan import merge_parts

    _print_report(merge_parts(output, strict=strict))


@shards.command()
@click.argument("manifest")
@click.argument("output")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", default="features", show_default=True, help="A yaml file, or the name of a shipped one.")
@click.option(
    "--batch", default=16, show_default=True, type=click.IntRange(1), help="Number of clips encoded at a time."
)
@click.option("--part", metavar="I/N", help="Encode the I-th of N parts only; run merge when all are done.")
def features(manifest: str, output: str, overrides: tuple[str, ...], config: str, batch: int, part: str | None) -> None:
    """Run frozen encoders over the clip shards of MANIFEST and write feature shards (float16) to OUTPUT.

    The configuration has the encoders and the preparation of clips for them. Under torchrun or srun each process
    encodes its share of the shards on its own GPU, and `avcil shards merge OUTPUT` completes the data set. Shards
    that an interrupted run finished are not encoded again.

    \b
    Examples:
      avcil shards features shards/manifest.json features \\
          model.visual.weights=MCG-NJU/videomae-base model.audio.weights=audiomae.pth
      torchrun --nproc-per-node 8 -m launch shards features s3://bucket/vggsound/manifest.json \\
          s3://bucket/vggsound-features --config mine.yaml --part $SLURM_ARRAY_TASK_ID/4
    """
    from avcil_dist.compose import load_config
    from avcil_dist.training.collectives import local_device
    from avcil_dist.world import world_from_environment
    from data_shards.build_plan import WHOLE, Part
    from data_shards.features import make_features, make_features_part

    resolved = load_config(config, (*overrides, f"data.manifest={manifest}"))
    world = world_from_environment(os.environ)
    share = (Part.parse(part) if part else WHOLE).of_rank(world.rank, world.size)
    device = local_device(world)
    with CountBar("encoding features") as bar:
        if share.is_whole:
            report = make_features(resolved, output, batch=batch, device=device, progress=bar.show)
        else:
            show = bar.show if world.is_main else None
            unchanged = make_features_part(resolved, output, share, batch=batch, device=device, progress=show)
            if unchanged is None:
                if world.is_main:
                    click.echo(
                        f"{output}: this rank's part is done; when all parts are done: avcil shards merge {output}"
                    )
                return
            report = unchanged
    if world.is_main:
        _print_report(report)


@shards.command("import-features")
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
    _print_report(report)


@shards.command()
@click.argument("manifest")
@click.option("--repair", is_flag=True, help="Rewrite the manifest so that it lists the intact shards only.")
@click.option(
    "--processes", default=CORES, show_default=True, type=click.IntRange(1), help="Number of processes that read."
)
def verify(manifest: str, repair: bool, processes: int) -> None:
    """Read every shard of MANIFEST and compare it with the manifest: size, sha256, keys, offsets, labels.

    Example: avcil shards verify runs/shards/manifest.json
    """
    from data_shards.verify import repair_manifest, verify_shards

    with CountBar("verifying shards") as bar:
        if repair:
            repaired, faults = repair_manifest(manifest, processes=processes, progress=bar.show)
        else:
            faults = verify_shards(manifest, processes=processes, progress=bar.show)
    for fault in faults:
        click.echo(fault)
    if not faults:
        click.echo(f"{manifest}: all shards are intact")
    elif repair:
        clips = sum(shard.count for shard in repaired.shards)
        click.echo(f"{manifest}: repaired: {len(repaired.shards)} intact shards, {clips} clips; {len(faults)} faults")
    else:
        raise DataError(f"{manifest}: {len(faults)} faults; restore the shards, build them again, or use --repair")


@shards.command("ls")
@click.argument("manifest")
def list_shards(manifest: str) -> None:
    """List the contents of MANIFEST: shards, clips and bytes per class and split.

    Example: avcil shards ls s3://bucket/vggsound/manifest.json
    """
    from avcil_dist.data.manifest import SPLITS, load_manifest
    from data_shards.verify import TableRow, shard_table

    loaded = load_manifest(manifest)
    rows = shard_table(loaded)
    sums = [TableRow("all", split, *_sums(row for row in rows if row.split == split)) for split in SPLITS]
    rows += [*(row for row in sums if row.shards), TableRow("all", "", *_sums(rows))]
    width = max(len("class"), *(len(row.class_name) for row in rows))
    click.echo(f"{'class':{width}}  split  shards   clips           bytes")
    for row in rows:
        click.echo(f"{row.class_name:{width}}  {row.split:5}  {row.shards:6d}  {row.clips:6d}  {row.bytes:14d}")
    click.echo(f"kind {loaded.kind}, {len(loaded.classes)} classes, content hash {loaded.content_hash}")


def _sums(rows: Iterable["TableRow"]) -> tuple[int, int, int]:
    """Sums of shards, clips and bytes."""
    counted = [(row.shards, row.clips, row.bytes) for row in rows]
    return sum(one for one, _, _ in counted), sum(one for _, one, _ in counted), sum(one for _, _, one in counted)


@shards.command("import-tars")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--output", required=True, help="The manifest to write; urls below its folder become relative.")
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

    Each tar is read once and must hold one split of one class; other tars have to be built again. With --classes
    the numbers in KEY.cls, counted from 0, get names.

    Example: avcil shards import-tars s3://bucket/others/dog-*.tar --split train --output s3://bucket/others/manifest.json
    """
    from data_shards.importers.webdataset_tars import import_tars
    from data_shards.listings.listing import read_class_names

    names = read_class_names(classes) if classes else []
    with CountBar("reading shards") as bar:
        manifest = import_tars(urls, output, split=split, classes=names, processes=processes, progress=bar.show)
    clips = sum(shard.count for shard in manifest.shards)
    click.echo(f"{output}: written: {clips} clips, {len(manifest.classes)} classes, {len(manifest.shards)} shards")
