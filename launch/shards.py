"""`avcil shards`: make, check and list shards. Thin: the work is in the package `data_shards`."""

import os
import time
from pathlib import Path
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from avcil_dist.errors import DataError

QUIET_SECONDS = 3.0
CORES = len(os.sched_getaffinity(0))


class _Bar:
    """A progress bar on stderr for work that lasts; short work stays silent."""

    def __init__(self, title: str) -> None:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task: TaskID | None = None
        self._start = time.monotonic()
        self._count = 0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self._task is None:
            if time.monotonic() - self._start < QUIET_SECONDS:
                return
            self._task = self._progress.add_task("", total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)

    def advance(self, total: int) -> None:
        """Show that one more of `total` is done."""
        self._count += 1
        self.show(self._count, total)


@click.group()
def shards() -> None:
    """Make, check and list the shards that training reads."""


@shards.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--classes", default=8, show_default=True, type=click.IntRange(1), help="Number of classes.")
@click.option("--train", default=40, show_default=True, type=click.IntRange(0), help="Training clips a class.")
@click.option("--val", default=8, show_default=True, type=click.IntRange(0), help="Validation clips a class.")
@click.option("--test", default=10, show_default=True, type=click.IntRange(0), help="Test clips a class.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of a clip.")
@click.option("--size", default=64, show_default=True, help="Side of the square picture, pixels (even).")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--processes", default=CORES, show_default=True, type=click.IntRange(1), help="Rendering processes.")
def synth(
    folder: Path, classes: int, train: int, val: int, test: int, seconds: float, size: int, seed: int, processes: int
) -> None:
    """Render a labelled audio-visual data set of mp4 files into FOLDER.

    In each clip one pulsing shape makes the tone of its class, among silent shapes of other classes. Clips that
    are there already are kept. Then build shards from FOLDER/clips.csv.

    Example: avcil shards synth runs/clips --classes 8 --train 40
    """
    from data_shards.synthetic import SyntheticSpec, render_dataset

    clips = {"train": train, "val": val, "test": test}
    spec = SyntheticSpec(num_classes=classes, clips=clips, seconds=seconds, size=size, seed=seed)
    with _Bar("rendering clips") as bar:
        path = render_dataset(folder, spec, progress=lambda: bar.advance(spec.num_clips), processes=processes)
    click.echo(f"{path}: {spec.num_clips} clips of {classes} classes; next: avcil shards build {path} OUTPUT")


@shards.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output")
@click.option(
    "--clips-per-shard", default=256, show_default=True, type=click.IntRange(1), help="Clips in a full shard."
)
@click.option("--min-seconds", default=0.5, show_default=True, type=click.FloatRange(0), help="Reject shorter clips.")
@click.option("--processes", default=CORES, show_default=True, type=click.IntRange(1), help="Checking processes.")
@click.option("--strict", is_flag=True, help="A rejected clip is an error: no manifest is written.")
def build(source: Path, output: str, clips_per_shard: int, min_seconds: float, processes: int, strict: bool) -> None:
    """Build shards and OUTPUT/manifest.json from the clips of SOURCE. OUTPUT is a folder or url (s3://...).

    SOURCE is a csv with the header path,label,split (paths relative to the csv; a column `source` may name the
    video that a clip was cut from), a folder SOURCE/<split>/<class>/*.mp4, or a folder SOURCE/<class>/*.mp4, whose
    clips are split 80/10/10 into train, val and test by a hash of class and file name.

    Every clip is decoded once. Clips that are missing, damaged, silent, too short, no mp4 or come twice are left out
    and listed with the reason in OUTPUT/rejected.csv. A build that was broken off continues where it was. An OUTPUT
    that has a manifest is never overwritten: made of the same clips with the same settings, it is left as it is;
    otherwise give another OUTPUT, or remove it.

    Example: avcil shards build runs/clips/clips.csv runs/shards

    Example: avcil shards build ~/vggsound s3://bucket/vggsound --clips-per-shard 512 --min-seconds 9
    """
    from data_shards.build import build_shards

    with _Bar("building shards") as bar:
        report = build_shards(
            source,
            output,
            clips_per_shard=clips_per_shard,
            min_seconds=min_seconds,
            processes=processes,
            strict=strict,
            progress=bar.show,
        )
    manifest = report.manifest
    clips = sum(shard.count for shard in manifest.shards)
    said = "unchanged, made before from the same clips" if report.unchanged else "written"
    click.echo(
        f"{report.manifest_url}: {said}: {clips} clips, {len(manifest.classes)} classes, {len(manifest.shards)} shards"
    )
    if report.rejected:
        counts = ", ".join(f"{name} {count}" for name, count in report.rejected_per_class.items())
        click.echo(f"{len(report.rejected)} clips rejected ({counts}); the reasons are in rejected.csv", err=True)


@shards.command()
@click.argument("manifest")
def verify(manifest: str) -> None:
    """Read every shard of MANIFEST and hold it against the manifest: size, sha256, keys, places, labels.

    Example: avcil shards verify runs/shards/manifest.json
    """
    from data_shards.verify import verify_shards

    with _Bar("verifying shards") as bar:
        faults = verify_shards(manifest, progress=bar.show)
    for fault in faults:
        click.echo(fault)
    if faults:
        raise DataError(f"{manifest}: {len(faults)} faults; restore the shards, or build them again")
    click.echo(f"{manifest}: every shard is as recorded")


@shards.command("ls")
@click.argument("manifest")
def list_shards(manifest: str) -> None:
    """List what MANIFEST holds: shards, clips and bytes per class and split.

    Example: avcil shards ls s3://bucket/vggsound/manifest.json
    """
    from avcil_dist.data.manifest import load_manifest
    from data_shards.verify import table

    loaded = load_manifest(manifest)
    rows = table(loaded)
    width = max([len("class"), *(len(row.class_name) for row in rows)])
    click.echo(f"{'class':{width}}  split  shards   clips         bytes")
    for row in rows:
        click.echo(f"{row.class_name:{width}}  {row.split:5}  {row.shards:6d}  {row.clips:6d}  {row.bytes:12d}")
    clips, size = sum(row.clips for row in rows), sum(row.bytes for row in rows)
    click.echo(f"{'all':{width}}  {'':5}  {len(loaded.shards):6d}  {clips:6d}  {size:12d}")
    click.echo(f"kind {loaded.kind}, {len(loaded.classes)} classes, content hash {loaded.content_hash}")
