"""Command `avcil reproduce`: the tables of the paper for a benchmark, as one resumable sweep and one page."""

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from launch.cli.options import log_options, processes_option, split_words
from launch.cli.output import echo, echo_progress, is_main_rank

if TYPE_CHECKING:
    from launch.sweep import GridPoint


@click.command()
@click.argument("benchmark")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Seeds 0 to N - 1.")
@click.option("--page", metavar="FILE", help="Page to write.  [default: BENCHMARK-tables.html in the output folder]")
@click.option("--dry-run", is_flag=True, help="List the streams; train nothing and read no data.")
@processes_option("Processes (ranks) of each stream.")
@click.option("--parallel", type=click.IntRange(1), default=1, show_default=True, help="Streams at the same time.")
@click.option("--cluster", help="Submit each stream as a chain of jobs; a cluster file, or a shipped one.")
@log_options
def reproduce(
    benchmark: str,
    words: tuple[str, ...],
    seeds: int,
    page: str | None,
    dry_run: bool,
    processes: int | None,
    parallel: int,
    cluster: str | None,
) -> None:
    """Train all streams of the paper's tables on BENCHMARK: ave_ci, ks_ci, vs100_ci, or a file of the same form.

    These are all methods on sound, pictures and both, and the ablation of AV-CIL's three parts; 32 streams per seed.
    Committed steps are skipped, so the same command continues. At the end it prints the comparison, with published
    results and a test over seeds, and writes a page. With --cluster the streams are chains of jobs; the same command
    writes the page once they are done.

    \b
    Examples:
      avcil reproduce ave_ci --dry-run
      avcil reproduce ave_ci --seeds 3
      avcil reproduce vs100_ci --cluster my-cluster.yaml cluster.max_parallel=8
    """
    from launch.local_worlds import num_ranks
    from launch.reproduce import reproduction_grid

    settings, of_cluster = split_words(words, cluster)
    if parallel > 1:
        from launch.sweep_runs import check_parallel

        check_parallel(cluster)
    if dry_run:
        points = reproduction_grid(benchmark, settings, seeds=seeds, processes=1, checked=False)
        for point in points:
            echo(f"{point.config.stream_name}  {' '.join(point.overrides)}")
        echo(f"{len(points)} streams", err=True)
        return
    if cluster is not None:
        points, has_jobs = _submit(benchmark, settings, seeds, cluster, of_cluster)
        if has_jobs:
            folder = shlex.quote(points[0].config.output)
            echo(f"see all with: avcil status {folder}; the same command writes the page once they are done")
            return
    else:
        from launch.sweep_runs import run_points

        points = reproduction_grid(benchmark, settings, seeds=seeds, processes=num_ranks(os.environ, processes))
        run_points(benchmark, points, processes, echo_progress, parallel=parallel)
    if is_main_rank():
        from avcil_dist.streams.stream import stream_url

        first = points[0].config
        path = page or f"{first.output.rstrip('/')}/{first.name}-tables.html"
        _show([stream_url(point.config) for point in points], path)


def _submit(
    benchmark: str, settings: Sequence[str], seeds: int, cluster: str, of_cluster: Sequence[str]
) -> "tuple[list[GridPoint], bool]":
    """Submit the streams as chains. Returns them, and whether any job is there: none, if all steps are committed."""
    from launch.cluster.resources import load_cluster
    from launch.cluster.schedulers.base import scheduler_of
    from launch.reproduce import reproduction_grid
    from launch.sweep_runs import submit_points

    resources = load_cluster(cluster, of_cluster)
    num_streams = len(reproduction_grid(benchmark, settings, seeds=seeds, processes=1, checked=False))
    lanes = scheduler_of(resources.kind).lanes(resources, num_streams)
    points = reproduction_grid(benchmark, settings, seeds=seeds, processes=lanes[0].cluster.world_size)
    return points, bool(submit_points(points, resources, lanes, echo))


def _show(folders: Sequence[str], page: str) -> None:
    """Print the comparison of the streams and write their page."""
    from rich.console import Console

    from avcil_dist.reporting.compare import compared, group_by_config
    from avcil_dist.reporting.formats import print_table
    from avcil_dist.reporting.page import write_page
    from avcil_dist.reporting.published import load_published
    from avcil_dist.reporting.report import load_streams

    streams = load_streams(folders)
    print_table(compared(group_by_config(streams), significance=True, published=load_published()), Console())
    write_page(streams, page)
    echo(f"wrote {page}")
