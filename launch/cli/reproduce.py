"""Command `avcil reproduce`: the tables of the paper for a benchmark, as one resumable sweep and one page."""

import os
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from launch.cli.options import grid_options, log_options, smoke_option, split_words
from launch.cli.output import CONTINUES_TRAINING, SMOKE_NOTE, echo, echo_progress, interrupt_note, is_main_rank

if TYPE_CHECKING:
    from launch.sweep import GridPoint


@click.command()
@click.argument("benchmark")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--seeds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Seeds 0 to N - 1.")
@click.option("--page", metavar="FILE", help="Page to write.  [default: BENCHMARK-tables.html in the output folder]")
@click.option("--dry-run", is_flag=True, help="List the streams; train nothing and read no data.")
@grid_options
@smoke_option
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
    smoke: bool,
) -> None:
    """Train all streams of the paper's tables on BENCHMARK: ave_ci, ks_ci, vs100_ci, or a file of the same form.

    These are all methods on sound, pictures and both, and the ablation of AV-CIL's three parts; 32 streams per seed.
    Committed steps are skipped, so the same command continues. At the end it prints the comparison, with published
    results and a test over seeds, and writes a page. With --cluster the streams are chains of jobs; the same command
    writes the page once they are done.

    \b
    Examples:
      avcil reproduce ave_ci --dry-run
      avcil reproduce ave_ci --seeds 1 --smoke
      avcil reproduce ave_ci --seeds 3
      avcil reproduce vs100_ci --cluster my-cluster.yaml cluster.max_parallel=8
    """
    from launch.local_worlds import num_ranks
    from launch.reproduce import reproduction_grid
    from launch.sweep_runs import check_parallel, run_points

    settings, of_cluster = split_words(words, cluster)
    if parallel > 1:
        check_parallel(cluster)

    def grid(ranks: int, *, checked: bool = True) -> "list[GridPoint]":
        return reproduction_grid(benchmark, settings, seeds=seeds, processes=ranks, smoke=smoke, checked=checked)

    if dry_run:
        listed = grid(1, checked=False)
        for point in listed:
            echo(f"{point.config.stream_name}  {' '.join(point.overrides)}")
        echo(f"{len(listed)} streams", err=True)
        return
    if cluster is not None:
        points = _submit(grid, len(grid(1, checked=False)), cluster, of_cluster, smoke=smoke)
        if not points:
            return
    else:
        points = grid(num_ranks(os.environ, processes))
        with interrupt_note("" if smoke else CONTINUES_TRAINING):
            run_points(benchmark, points, processes, echo_progress, parallel=parallel, smoke=smoke)
    if is_main_rank():
        from avcil_dist.streams.stream import stream_url

        first = points[0].config
        path = page or f"{first.output.rstrip('/')}/{first.name}-tables.html"
        _show([stream_url(point.config) for point in points], path)
        if smoke:
            echo(SMOKE_NOTE)


def _submit(
    grid: "Callable[[int], Sequence[GridPoint]]",
    num_streams: int,
    cluster: str,
    of_cluster: Sequence[str],
    *,
    smoke: bool,
) -> "Sequence[GridPoint]":
    """Submit the streams as chains. Returns them once all their steps are committed, and none before."""
    from launch.cluster.resources import load_cluster
    from launch.resume_policy import ResumePolicy
    from launch.sweep_runs import submit_grid

    policy = ResumePolicy(restart=smoke)
    submission = submit_grid(grid, num_streams, load_cluster(cluster, of_cluster), echo, policy)
    if not submission.num_jobs:
        return submission.points
    if submission.note:
        echo(submission.note, err=True)
    folder = shlex.quote(submission.output)
    echo(f"see all with: avcil status {folder}; the same command writes the page once they are done")
    return []


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
