"""Commands of published data sets: `avcil data get`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from launch.cli.count_bar import CountBar
from launch.cli.output import CONTINUES, echo, interrupt_note
from launch.cli.shards_build import print_report

if TYPE_CHECKING:
    from data_shards.downloads.get import Keep
    from data_shards.downloads.sources import DataSet

NAMES = ("ave", "ks", "vs100", "vggsound-lists")


@click.group()
def data() -> None:
    """Get published data sets."""


@data.command()
@click.argument("name", type=click.Choice(NAMES))
@click.argument("folder", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--from",
    "mirror",
    envvar="AVCIL_DATA_MIRROR",
    metavar="URL|FOLDER",
    help="Mirror: a folder or a url (http, https, or object storage) that holds the files under their published paths, "
    "such as another FOLDER/downloads.  [env: AVCIL_DATA_MIRROR]",
)
@click.option("--output", help="Folder or url of the shards.  [default: FOLDER/shards]")
@click.option(
    "--keep",
    type=click.Choice(["archives", "all", "nothing"]),
    default="archives",
    show_default=True,
    help="What stays after the import: the archives, the unpacked features too, or the lists and shards alone.",
)
@click.option("--lists", is_flag=True, help="The split lists alone, for videos that you have.")
@click.option("--dry-run", is_flag=True, help="List the files with their sizes, and download nothing.")
def get(
    name: str, folder: Path | None, mirror: str | None, output: str | None, keep: str, lists: bool, dry_run: bool
) -> None:
    """Download a published data set into FOLDER and import its features as shards.

    \b
    ave             split lists and features of AVE             (avcil train ave_ci)
    ks              the same of Kinetics-Sounds                 (avcil train ks_ci)
    vs100           the same of VGGSound100                     (avcil train vs100_ci)
    vggsound-lists  VGGSound's csv, for videos that you have    (avcil shards build)

    FOLDER is the folder that the benchmark's configuration names by default, such as runs/ave. An interrupted download
    continues with the same command. Digests that are published are checked, all others are recorded in
    FOLDER/downloads/downloads.json and checked by the next download. Files of the Hugging Face hub come from
    HF_ENDPOINT, if that is set, and not at all with HF_HUB_OFFLINE=1.

    \b
    Examples:
      avcil data get ave
      avcil data get vs100 /scratch/vs100 --output s3://bucket/vs100 --keep nothing
      avcil data get ks --from /datasets/avcil-mirror
      avcil data get ave --lists
    """
    from data_shards.downloads.get import SHARDS, Meters, describe_files, get_data_set, is_imported, list_files
    from data_shards.downloads.sources import data_set_of

    data_set = data_set_of(name).without_features() if lists else data_set_of(name)
    place = folder or Path(data_set.folder)
    shards = output or f"{place}/{SHARDS}"
    if is_imported(data_set, place, shards):
        echo(f"{shards}: imported already; {_next(data_set, shards)}")
        return
    with interrupt_note(f"{CONTINUES} where it stopped"):
        listed = list_files(data_set, place, mirror)
        echo("\n".join(describe_files(data_set, listed, place)))
        if dry_run:
            return
        with (
            CountBar("downloading (MiB)") as download,
            CountBar("reading files (MiB)") as digest,
            CountBar("unpacking (MiB)") as unpack,
            CountBar("importing features") as clips,
        ):
            meters = Meters(download.show, digest.show, unpack.show, clips.show)
            fetched = get_data_set(data_set, listed, place, shards, keep=cast("Keep", keep), meters=meters)
    if fetched.report is not None:
        print_report(fetched.report)
    echo(_next(data_set, shards, fetched.paths[data_set.lists[0].path]))


def _next(data_set: "DataSet", shards: str, first_list: Path | None = None) -> str:
    """Return the line with the command that comes after the download. `first_list`: the first of the lists."""
    if not data_set.archive and first_list is not None:
        listing = shlex.quote(str(first_list if len(data_set.lists) == 1 else first_list.parent))
        return f"next: avcil shards build {listing} {shlex.quote(f'{data_set.folder}/clips')} --videos FOLDER-OF-VIDEOS"
    is_default = shards == f"{data_set.folder}/shards"
    setting = "" if is_default else f" data.manifest={shlex.quote(f'{shards}/manifest.json')}"
    return f"next: avcil train {data_set.benchmark}{setting}"
