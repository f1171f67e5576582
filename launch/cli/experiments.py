"""Commands on many streams, and on methods: `methods`, `sweep`, `compare`."""

import sys
from typing import Any

import click


@click.command()
def methods() -> None:
    """List the methods: what each needs of a step, and its options.

    A method is one file of avcil_dist/methods and one yaml of configs/method.
    """
    from avcil_dist.methods import method_class, method_names
    from avcil_dist.training.preflight import describe

    for name in method_names():
        kind = method_class(name)
        summary = (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
        click.echo(f"{click.style(name, bold=True)}: {summary}")
        click.echo(f"  needs    {', '.join(describe(kind(kind.Options()).needs)) or 'nothing'}")
        for option, field in kind.Options.model_fields.items():
            said = f"  {field.description}" if field.description else ""
            click.echo(f"  option   {option}={_shown(field.default)} ({_kind(field.annotation)}){said}")


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="RUN...")
def compare(folders: tuple[str, ...]) -> None:
    """Show methods side by side; streams that differ in their seed alone become one row, mean ± deviation.

    RUN is a stream's folder, or one that holds several. Example: avcil compare runs
    """
    from rich.console import Console

    from avcil_dist.reporting.compare import group_by_config, print_comparison
    from avcil_dist.reporting.report import load_streams

    print_comparison(group_by_config(load_streams(folders)), Console())


@click.command()
@click.argument("config")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE,VALUE...]...")
@click.option("--ablation", is_flag=True, help="Every combination of avcil's three parts, on and off.")
@click.option("--processes", "-n", default=1, show_default=True, help="Processes (ranks) of each stream.")
@click.option(
    "--cluster", help="Submit each stream as a chain of jobs; a cluster file, or a shipped one: slurm, local."
)
def sweep(config: str, words: tuple[str, ...], ablation: bool, processes: int, cluster: str | None) -> None:
    """Train the streams of all combinations of settings on this machine, one after the other, and compare them.

    Everything is checked before the first starts. Steps that are committed are not done again. With
    --cluster the streams are chains of jobs, as of `avcil submit`, of which the cluster file's
    max_parallel run at a time.

    \b
    Examples:
      avcil sweep demo method=finetune,avcil,joint seed=1,2,3
      avcil sweep configs/benchmark/demo.yaml --ablation
      avcil sweep vs100_ci method=avcil,ssil seed=1,2,3 --cluster my-cluster.yaml cluster.max_parallel=2
    """
    from rich.console import Console

    from avcil_dist.reporting.compare import group_by_config, print_comparison
    from avcil_dist.reporting.report import load_streams
    from launch.cli.jobs import split_words, submit_grid
    from launch.local import run_stream
    from launch.sweep import make_grid

    settings, of_cluster = split_words(words, cluster)
    if cluster is not None:
        submit_grid(config, settings, cluster, of_cluster, ablation=ablation)
        return
    points = make_grid(config, settings, ablation=ablation, processes=processes)
    folders = []
    for number, point in enumerate(points, start=1):
        click.echo(f"{number}/{len(points)}  {point.config.stream_name}  {' '.join(point.overrides)}", err=True)
        folders.append(run_stream(point.config, processes=processes))
    print_comparison(group_by_config(load_streams(folders)), Console())


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(annotation: Any) -> str:
    """An option's type as people write it: the values of a choice, else the type's name."""
    choices = [str(choice) for choice in getattr(annotation, "__args__", ()) if isinstance(choice, str)]
    return " | ".join(choices) or getattr(annotation, "__name__", str(annotation))
