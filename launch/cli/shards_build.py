"""Commands `avcil shards build`, `repack`, `merge` and `features`: the shards of clips and of their features."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from avcil_dist.errors import ConfigError
from launch.cli.count_bar import CountBar
from launch.cli.options import split_words
from launch.cli.output import CONTINUES, echo, interrupt_note
from launch.cli.shards_cluster import ClusterJobs, cluster_options, is_built, run_on_cluster

if TYPE_CHECKING:
    from data_shards.build_plan import BuildReport
    from data_shards.importers.feature_importer import FeatureImporter
    from data_shards.listings.listing import Listing

CORES = len(os.sched_getaffinity(0))

BUILD_HELP = """Build shards and OUTPUT/manifest.json from the clips of SOURCE. OUTPUT is a folder or url (s3://...).

SOURCE is one of these; its form is recognised:

\b
  clips.csv            header path,label and any of split,start,duration,source;
                       paths relative to the csv; start and duration cut out a part
  FOLDER               FOLDER/<split>/<class>/*.mp4, or FOLDER/<class>/*.mp4
  vggsound.csv         or VGGSound's train.csv and test.csv; 10 training clips per class
                       become val; needs --videos, as all below
  Annotations.txt      of AVE, with its trainSet.txt, valSet.txt, testSet.txt beside it
  FOLDER of lists      all_classId_vid_dict.npy and its two companions, as published

Where a video file may be, there may also be a folder of pictures, ID/00001.jpg ... with ID.wav. Their times are
--fps, from number 0 or 1 on, or names such as 12.480.jpg, or a line for each picture in ID/times.txt.

A SOURCE without splits is split within each class (--split). Clips of one source video, by the source column or by the
video id in the file name, are in one split, and each class has a clip in each split where it can.

Files in the folder tree of --videos have the names ID_000030, ID_30_40, ID_30000_40000 (ms), ID_000030_000040 or ID,
in any container. Of the last, VGGSound's ten seconds are cut out: copied where a key frame allows it, otherwise encoded
again. In FOLDER, files without the ending of a video are passed over and counted.

Every clip is decoded once. Clips that are missing, damaged, silent, too short, no mp4 or duplicate are left out and
listed with the reason in OUTPUT/rejected.csv. An interrupted build continues when it is started again. An OUTPUT
with a manifest is never overwritten; with the same clips and settings it is left unchanged.

A layout that is none of these is read by an importer of another package (--importer), clips or features.

With --cluster, each part is a job, and a last job merges them. The command shows their progress; Ctrl-C leaves the
jobs, and the same command shows them again, or continues with the shards that are not done.

\b
Examples:
  avcil shards build runs/clips/clips.csv runs/shards
  avcil shards build vggsound.csv s3://bucket/vggsound --videos ~/vggsound --min-seconds 9
  avcil shards build vggsound.csv shards --videos /data/vggsound --cluster slurm --parts 64 cluster.cpus_per_task=8
  avcil shards build vggsound.csv s3://bucket/vggsound --videos /data/vggsound --part $SLURM_ARRAY_TASK_ID/64
"""


def print_report(report: "BuildReport | None") -> None:
    """Print the data set, its splits, and its rejected clips; nothing without a report."""
    if report is None:
        return
    from data_shards.build_plan import REJECTED
    from data_shards.rejections import rejection_table
    from data_shards.split_table import lacking_classes, split_table

    manifest = report.manifest
    clips = sum(shard.count for shard in manifest.shards)
    state = "unchanged, built before from the same clips" if report.unchanged else "written"
    echo(
        f"{report.manifest_url}: {state}: {clips} clips, {len(manifest.classes)} classes, {len(manifest.shards)} shards"
    )
    console = Console(stderr=True)
    console.print(split_table(manifest))
    for line in lacking_classes(manifest):
        echo(line, err=True)
    if report.rejected:
        console.print(rejection_table(report.rejected))
        count, folder = len(report.rejected), report.manifest_url.rpartition("/")[0]
        lists = f"{folder}/{REJECTED} lists {'it' if count == 1 else 'them'} with the reason{'s' * (count != 1)}"
        echo(f"{count} clip{'s' * (count != 1)} rejected; {lists}", err=True)


def clip_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every build of clip shards to a command; see `run_build`."""
    options = (
        click.option(
            "--clips-per-shard", default=256, show_default=True, type=click.IntRange(1), help="Clips in a full shard."
        ),
        click.option(
            "--min-seconds", default=0.5, show_default=True, type=click.FloatRange(0), help="Reject shorter clips."
        ),
        click.option(
            "--keep-muted", is_flag=True, help="Take clips whose sound is all zeros; by default they are rejected."
        ),
        click.option(
            "--processes",
            default=CORES,
            show_default=True,
            type=click.IntRange(1),
            help="Number of processes that check clips.",
        ),
        click.option("--part", metavar="I/N", help="Build the I-th of N parts only; run merge when all are done."),
        click.option("--strict", is_flag=True, help="A rejected clip is an error: no manifest is written."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def run_build(
    listing: "Listing",
    output: str,
    *,
    clips_per_shard: int,
    min_seconds: float,
    keep_muted: bool,
    processes: int,
    part: str | None,
    strict: bool,
) -> None:
    """Build the shards of a listing, or one part of them, with the options of `clip_options`; print the report."""
    from data_shards.build import BuildSettings, build_listing, build_listing_part
    from data_shards.build_plan import Part

    settings = BuildSettings(clips_per_shard, min_seconds, keep_muted)
    with CountBar("building shards") as bar:
        if part is None:
            report = build_listing(listing, output, settings, processes=processes, strict=strict, progress=bar.show)
        else:
            share = Part.parse(part)
            unchanged = build_listing_part(listing, output, share, settings, processes=processes, progress=bar.show)
            if unchanged is None:
                echo(f"{output}: part {part} is done; when all parts are done: avcil shards merge {output}")
                return
            report = unchanged
    print_report(report)


def check_part(part: str | None, strict: bool) -> None:
    """Raise ConfigError for a part that is to be strict, or of another form than I/N."""
    from data_shards.build_plan import Part

    if part is not None:
        Part.parse(part)
        if strict:
            raise ConfigError("--strict: a part writes no manifest; give --strict to avcil shards merge")


@click.command(help=BUILD_HELP, short_help="Pack the clips of a folder, a csv, or a benchmark's lists.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output")
@click.option(
    "--videos", type=click.Path(path_type=Path), help="Folder of the video files, for a SOURCE that names videos by id."
)
@click.option(
    "--split",
    metavar="TRAIN,VAL,TEST",
    help="Shares of the splits in each class, for a SOURCE without splits.  [default: 0.8,0.1,0.1]",
)
@click.option("--fps", type=float, help="Pictures a second, for clips that are folders of numbered pictures.")
@click.option(
    "--audio", type=click.Path(path_type=Path), help="Folder of the wav files of such clips; default: beside them."
)
@click.option(
    "--importer",
    metavar="NAME",
    help="Read SOURCE by this importer: a form of listing, one of an installed package, or package.module:Class.",
)
@click.argument("words", nargs=-1, metavar="[cluster.KEY=VALUE]...")
@clip_options
@cluster_options
@interrupt_note(CONTINUES)
def build(
    source: Path,
    output: str,
    videos: Path | None,
    split: str | None,
    fps: float | None,
    audio: Path | None,
    importer: str | None,
    words: tuple[str, ...],
    part: str | None,
    strict: bool,
    jobs: ClusterJobs | None,
    **settings: Any,
) -> None:
    """Build shards of the clips of a listing; see `BUILD_HELP`."""
    from data_shards.importers.feature_importer import FeatureImporter
    from data_shards.importers.plug_in import load_importer
    from data_shards.listings.frame_folders import FrameOptions
    from data_shards.listings.read import read_listing
    from data_shards.listings.splits import SplitShares

    check_part(part, strict)
    own, _ = split_words(words, jobs.cluster if jobs else None)
    if own:
        raise ConfigError(f"{own[0]}: left over after SOURCE and OUTPUT")
    shares = SplitShares.parse(split) if split is not None else None
    form = load_importer(importer) if importer else None
    if isinstance(form, FeatureImporter):
        if given := [name for name, value in {"--part": part, "--cluster": jobs, "--videos": videos}.items() if value]:
            raise ConfigError(f"{given[0]}: {importer} reads features, which one process imports; leave it out")
        _import_features(form, source, output, settings["clips_per_shard"])
        return
    listing = read_listing(source, videos, shares, FrameOptions(fps, audio), form)
    if jobs and not is_built(output):
        print_report(run_on_cluster(jobs, output, title="building shards", strict=strict, words=words))
    else:
        run_build(listing, output, part=part, strict=strict, **settings)


def _import_features(importer: "FeatureImporter", source: Path, output: str, clips_per_shard: int) -> None:
    from data_shards.importers.feature_writer import import_foreign_features

    with CountBar("reading files (MiB)") as reading, CountBar("importing features") as bar:
        report = import_foreign_features(
            importer,
            source,
            output,
            clips_per_shard=clips_per_shard,
            digest_progress=reading.show,
            progress=bar.show,
        )
    print_report(report)


@click.command(short_help="Sort tars of mixed classes into shards by class and split.")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.argument("output")
@click.option(
    "--label",
    metavar="FIELD",
    help="Field of the json that is the class (a.b: b within a), or cls, or txt.  [default: label, then cls]",
)
@click.option(
    "--source",
    metavar="FIELD",
    help="Field of the json that names the source video.  [default: source, video_id, youtube_id, url; then the key]",
)
@click.option(
    "--classes", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="File of class names, one per line."
)
@click.option(
    "--split",
    metavar="TRAIN,VAL,TEST",
    help="Shares of the splits in each class; or `path`: the word train, val or test in the path of a tar.  "
    "[default: the split in the json; without, 0.8,0.1,0.1]",
)
@clip_options
@cluster_options
@interrupt_note(CONTINUES)
def repack(
    urls: tuple[str, ...],
    output: str,
    label: str | None,
    source: str | None,
    classes: Path | None,
    split: str | None,
    part: str | None,
    strict: bool,
    jobs: ClusterJobs | None,
    **settings: Any,
) -> None:
    """Sort the clips of WebDataset tars in which classes are mixed into shards by class and split, at OUTPUT.

    A sample is KEY.mp4, or another video, with KEY.json, KEY.cls or KEY.txt, as video2dataset, img2dataset and
    open_clip have them. URL may hold {000..099} and wildcards. Tars are read twice, their headers first and then each
    clip, and are never in memory or on the disk as a whole. Clips are checked as by build, and videos that are no mp4
    are converted. With --classes the numbers of classes, counted from 0, get names.

    \b
    Examples:
      avcil shards repack 's3://bucket/others/{00000..00099}.tar' s3://bucket/shards --label category
      avcil shards repack train-*.tar val-*.tar shards --split path --classes names.txt
      avcil shards repack 's3://bucket/others/*.tar' s3://bucket/shards --part $SLURM_ARRAY_TASK_ID/16
    """
    from data_shards.build_plan import WHOLE, Part
    from data_shards.listings.listing import read_class_names
    from data_shards.listings.mixed_tars import BY_PATH, SampleRules
    from data_shards.listings.splits import SplitShares
    from data_shards.repack import list_for_repack

    check_part(part, strict)
    rules = SampleRules(label, source, tuple(read_class_names(classes)) if classes else ())
    chosen = split if split is None or split == BY_PATH else SplitShares.parse(split)
    if jobs and not is_built(output):
        print_report(run_on_cluster(jobs, output, title="building shards", strict=strict))
        return
    with CountBar("reading headers of tars") as bar:
        share = Part.parse(part) if part else WHOLE
        listing = list_for_repack(urls, output, share, rules=rules, split=chosen, progress=bar.show)
    run_build(listing, output, part=part, strict=strict, **settings)


@click.command(short_help="Write the manifest when all parts are done.")
@click.argument("output")
@click.option("--strict", is_flag=True, help="A rejected clip is an error: no manifest is written.")
def merge(output: str, strict: bool) -> None:
    """Write OUTPUT/manifest.json when all parts of a build, or of features, are done.

    It equals the manifest of a single build. The error for missing parts names the first missing shard.

    Example: avcil shards merge s3://bucket/vggsound
    """
    from data_shards.build_plan import merge_parts
    from data_shards.output_lock import sole_build

    with sole_build(output):
        print_report(merge_parts(output, strict=strict))


@click.command(short_help="Run frozen encoders over clip shards.")
@click.argument("manifest")
@click.argument("output")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", default="features", show_default=True, help="A yaml file, or the name of a shipped one.")
@click.option(
    "--batch", default=16, show_default=True, type=click.IntRange(1), help="Number of clips encoded at a time."
)
@click.option("--part", metavar="I/N", help="Encode the I-th of N parts only; run merge when all are done.")
@cluster_options
@interrupt_note(CONTINUES)
def features(
    manifest: str,
    output: str,
    overrides: tuple[str, ...],
    config: str,
    batch: int,
    part: str | None,
    jobs: ClusterJobs | None,
) -> None:
    """Run frozen encoders over the clip shards of MANIFEST and write feature shards (float16) to OUTPUT.

    The configuration has the encoders and the preparation of clips for them. Under torchrun or srun each process
    encodes its share of the shards on its own GPU, and `avcil shards merge OUTPUT` completes the data set. Shards
    that an interrupted run finished are not encoded again. With engine.precision=bf16 a GPU is several times as fast.

    \b
    Examples:
      avcil shards features shards/manifest.json features \\
          model.visual.weights=MCG-NJU/videomae-base model.audio.weights=audiomae.pth
      torchrun --nproc-per-node 8 --no-python avcil shards features s3://bucket/vggsound/manifest.json \\
          s3://bucket/vggsound-features --config mine.yaml --part $SLURM_ARRAY_TASK_ID/4
      avcil shards features shards/manifest.json features --cluster slurm --parts 4 cluster.gpus_per_node=8
    """
    from avcil_dist.compose import load_config
    from avcil_dist.data.manifest import load_manifest
    from avcil_dist.training.device import local_device
    from avcil_dist.world import world_from_environment
    from data_shards.build_plan import WHOLE, Part
    from data_shards.features import make_features, make_features_part

    own, _ = split_words(overrides, jobs.cluster if jobs else None)
    resolved = load_config(config, (*own, f"data.manifest={manifest}"))
    if jobs and not is_built(output):
        load_manifest(manifest)
        title = "encoding features"
        print_report(run_on_cluster(jobs, output, title=title, strict=False, words=overrides, by_rank=True))
        return
    world = world_from_environment(os.environ)
    share = (Part.parse(part) if part else WHOLE).of_rank(world.rank, world.size)
    device = local_device(world, resolved.engine.device)
    with CountBar("encoding features") as bar:
        if share.is_whole:
            report = make_features(resolved, output, batch=batch, device=device, progress=bar.show)
        else:
            show = bar.show if world.is_main else None
            unchanged = make_features_part(resolved, output, share, batch=batch, device=device, progress=show)
            if unchanged is None:
                if world.is_main:
                    echo(f"{output}: this rank's part is done; when all parts are done: avcil shards merge {output}")
                return
            report = unchanged
    if world.is_main:
        print_report(report)
