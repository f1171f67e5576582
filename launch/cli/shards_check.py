"""Commands `avcil shards verify` and `avcil shards ls`."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from avcil_dist.errors import DataError
from launch.cli.count_bar import CountBar
from launch.cli.output import echo

if TYPE_CHECKING:
    from data_shards.verify import TableRow

CORES = len(os.sched_getaffinity(0))


@click.command(short_help="Compare every byte with the manifest.")
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
        echo(fault)
    if not faults:
        echo(f"{manifest}: all shards are intact")
    elif repair:
        clips = sum(shard.count for shard in repaired.shards)
        echo(f"{manifest}: repaired: {len(repaired.shards)} intact shards, {clips} clips; {len(faults)} faults")
    else:
        raise DataError(f"{manifest}: {len(faults)} faults; restore the shards, build them again, or use --repair")


@click.command("ls", short_help="List clips and bytes per class and split.")
@click.argument("manifest")
def list_shards(manifest: str) -> None:
    """List the contents of MANIFEST: shards, clips and bytes per class and split.

    Example: avcil shards ls s3://bucket/vggsound/manifest.json
    """
    from avcil_dist.data.manifest import load_manifest
    from avcil_dist.data.shard import SPLITS
    from data_shards.verify import TableRow, shard_table

    loaded = load_manifest(manifest)
    rows = shard_table(loaded)
    sums = [TableRow("all", split, *_sums(row for row in rows if row.split == split)) for split in SPLITS]
    rows += [*(row for row in sums if row.shards), TableRow("all", "", *_sums(rows))]
    width = max(len("class"), *(len(row.class_name) for row in rows))
    echo(f"{'class':{width}}  split  shards   clips           bytes")
    for row in rows:
        echo(f"{row.class_name:{width}}  {row.split:5}  {row.shards:6d}  {row.clips:6d}  {row.bytes:14d}")
    echo(f"kind {loaded.kind}, {len(loaded.classes)} classes, content hash {loaded.content_hash}")


def _sums(rows: Iterable["TableRow"]) -> tuple[int, int, int]:
    """Sums of shards, clips and bytes."""
    counted = [(row.shards, row.clips, row.bytes) for row in rows]
    return sum(one for one, _, _ in counted), sum(one for _, one, _ in counted), sum(one for _, _, one in counted)
