"""Commands on methods and on many streams: `methods`, `sweep`."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from launch.cli.options import grid_options, log_options, smoke_option, split_words
from launch.cli.output import (
    CONTINUES_TRAINING,
    SMOKE_NOTE,
    echo,
    echo_list,
    echo_progress,
    interrupt_note,
    is_main_rank,
)

if TYPE_CHECKING:
    from avcil_dist.methods.base import Method
    from launch.sweep import GridPoint


@click.command()
def methods() -> None:
    """List the methods: the requirements of each, and its options.

    Methods of installed packages follow the built-in ones; one that cannot be used is a line with the
    reason.
    """
    from avcil_dist.errors import ConfigError
    from avcil_dist.methods import method_class, method_names
    from avcil_dist.system.plugins import plug_in_names, refused_plug_ins

    built_in = method_names()
    for name in [*built_in, *plug_in_names("methods", built_in)]:
        try:
            _list_method(name, method_class(name))
        except ConfigError as error:
            echo(f"{name}: not usable: {error}")
    for line in refused_plug_ins("methods", built_in):
        echo(f"refused: {line}")


def _list_method(name: str, kind: "type[Method]") -> None:
    from avcil_dist.training.preflight import describe_needs

    summary = (sys.modules[kind.__module__].__doc__ or kind.__doc__ or "").strip().partition("\n")[0]
    echo_list(f"{name}: {summary}", indent=11)
    echo_list(f"  needs    {', '.join(describe_needs(kind(kind.Options()).needs)) or 'nothing'}", indent=9)
    for option, field in kind.Options.model_fields.items():
        description = f"  {field.description}" if field.description else ""
        echo_list(f"  option   {option}={_shown(field.default)} ({_kind(field.annotation)}){description}", indent=9)


@click.command()
@click.argument("config")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE,VALUE...]...")
@click.option("--ablation", is_flag=True, help="Every combination of avcil's three parts, on and off.")
@click.option(
    "--class-orders",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="N random orders of the classes, of the seeds 0 to N - 1; compared as mean ± deviation over them.",
)
@grid_options
@smoke_option
@log_options
def sweep(
    config: str,
    words: tuple[str, ...],
    ablation: bool,
    class_orders: int,
    processes: int | None,
    parallel: int,
    cluster: str | None,
    smoke: bool,
) -> None:
    """Train a stream for every combination of settings, one after the other on this machine, and compare them.

    All streams are checked before the first starts. Committed steps are skipped. With --cluster each
    stream is a chain of jobs as in `avcil submit`, and no more than max_parallel of the cluster file
    run at the same time.

    \b
    Examples:
      avcil sweep demo method=finetune,avcil,joint seed=1,2,3
      avcil sweep configs/benchmark/demo.yaml --ablation
      avcil sweep ave_ci method=avcil,analytic --class-orders 5 --parallel 4
      avcil sweep vs100_ci method=avcil,ssil seed=1,2,3 --cluster my-cluster.yaml cluster.max_parallel=2
    """
    from rich.console import Console

    from avcil_dist.reporting.compare import group_by_config, print_comparison
    from avcil_dist.reporting.report import load_streams
    from launch.local_worlds import num_ranks
    from launch.sweep import make_grid, num_points
    from launch.sweep_runs import check_parallel, run_points

    settings, of_cluster = split_words(words, cluster)
    if parallel > 1:
        check_parallel(cluster)

    def grid(ranks: int) -> "list[GridPoint]":
        return make_grid(config, settings, ablation=ablation, processes=ranks, class_orders=class_orders, smoke=smoke)

    if cluster is not None:
        num_streams = num_points(settings, ablation=ablation, class_orders=class_orders)
        _submit(grid, num_streams, cluster, of_cluster, smoke=smoke)
        return
    points = grid(num_ranks(os.environ, processes))
    with interrupt_note("" if smoke else CONTINUES_TRAINING):
        folders = run_points(config, points, processes, echo_progress, parallel=parallel, smoke=smoke)
    if is_main_rank():
        print_comparison(group_by_config(load_streams(folders)), Console())
        if smoke:
            echo(SMOKE_NOTE)


def _submit(
    grid: "Callable[[int], Sequence[GridPoint]]",
    num_streams: int,
    cluster: str,
    of_cluster: Sequence[str],
    *,
    smoke: bool,
) -> None:
    """Submit the streams of a grid as chains of jobs."""
    from launch.cluster.resources import load_cluster
    from launch.resume_policy import ResumePolicy
    from launch.sweep_runs import submit_grid

    submission = submit_grid(grid, num_streams, load_cluster(cluster, of_cluster), echo, ResumePolicy(restart=smoke))
    if submission.note:
        echo(submission.note, err=True)
    folder = shlex.quote(submission.output)
    echo(f"see all with: avcil status {folder}; compare them once they are done: avcil compare {folder}")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(annotation: Any) -> str:
    """Return an option's type for display: the values of a choice, else the type's name."""
    choices = [str(choice) for choice in getattr(annotation, "__args__", ()) if isinstance(choice, str)]
    return " | ".join(choices) or getattr(annotation, "__name__", str(annotation))
