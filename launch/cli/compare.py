"""Command `avcil compare`: methods side by side, over seeds, against papers, or clip by clip."""

import json
from typing import Any, cast

import click

from avcil_dist.errors import ConfigError
from launch.cli.options import predicted_clips_options
from launch.cli.output import echo, echo_once

FORMATS = ["table", "md", "csv", "latex", "json"]


def _metric_names(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Return the names of `--metrics`, checked."""
    if text is None:
        return None
    from avcil_dist.reporting.compare import METRICS

    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"--metrics: {unknown[0]!r} is none of {', '.join(METRICS)}")
    return names


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="RUN...")
@click.option("--format", "kind", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option(
    "--metrics",
    callback=_metric_names,
    metavar="NAME,NAME...",
    help="Columns, of: mean, final, forgetting, disjoint, bwt, task_il, top5, map.  "
    "[default: the first four; latex: mean,forgetting]",
)
@click.option(
    "--significance",
    is_flag=True,
    help="Paired t-test over seeds against the best row of a benchmark; `joint`, the upper bound, is set apart.",
)
@click.option("--published", is_flag=True, help="Add published results with their sources, and the difference.")
@click.option(
    "--paired",
    is_flag=True,
    help="Compare two streams clip by clip, as JSON: predict with both, or read files of predictions.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the bootstrap of --paired.")
@predicted_clips_options
def compare(
    folders: tuple[str, ...],
    kind: str,
    metrics: tuple[str, ...] | None,
    significance: bool,
    published: bool,
    paired: bool,
    seed: int,
    **clips: Any,
) -> None:
    """Show methods side by side; streams that differ in nothing but the seed are one row, mean ± deviation.

    RUN is a stream's folder, or a folder of several streams. With --paired two streams predict the clips of a split
    (--step, --split, --manifest, --modality and --device are for that): the difference in accuracy with a 95%
    interval by bootstrap over source videos, and McNemar's exact test. There RUN may also be a file that `avcil eval
    --predictions` wrote, .csv or .npz: nothing is predicted then.

    --format latex is the table of a paper (booktabs): methods below one another, benchmarks and metrics side by side,
    the best in bold; `joint` and published results are set apart.

    \b
    Examples:
      avcil compare runs --significance --published
      avcil compare runs --format latex --metrics mean,final > table.tex
      avcil compare runs/demo-avcil-seed0 runs/demo-finetune-seed0 --paired
      avcil compare avcil.csv finetune.csv --paired
    """
    if paired:
        of_tables = {f"--format {kind}": kind not in ("table", "json"), "--metrics": bool(metrics)}
        of_tables |= {"--significance": significance, "--published": bool(published)}
        if given := [name for name, is_given in of_tables.items() if is_given]:
            raise ConfigError(f"--paired: it compares clips, as JSON; leave out {', '.join(given)}")
        _compare_paired(folders, seed, **clips)
        return
    from rich.console import Console

    from avcil_dist.reporting.compare import TABLE_METRICS, compared, group_by_config
    from avcil_dist.reporting.formats import TextFormat, formatted, print_table
    from avcil_dist.reporting.published import load_published
    from avcil_dist.reporting.report import load_streams

    results = load_published() if published else None
    rows = group_by_config(load_streams(folders))
    if kind == "latex":
        from avcil_dist.reporting.latex import DEFAULT_METRICS, latex_table

        echo(latex_table(rows, metrics or DEFAULT_METRICS, significance=significance, published=results))
        return
    table = compared(rows, metrics or TABLE_METRICS, significance=significance, published=results)
    if kind == "table":
        print_table(table, Console())
    else:
        echo(formatted(table, cast(TextFormat, kind)))


def _compare_paired(folders: tuple[str, ...], seed: int, *, modality: str | None, **clips: Any) -> None:
    """Compare the predictions of two streams on the same clips, each predicted now or read from a file."""
    if len(folders) != 2:
        raise ConfigError(f"--paired: give two streams' folders or files of predictions, not {len(folders)}")
    from avcil_dist.inference.paired import ClipOutcomes, outcomes_of_file, outcomes_of_step, paired
    from avcil_dist.inference.predict import Modality
    from avcil_dist.inference.predictions_file import is_predictions_file
    from avcil_dist.inference.step_predictions import Condition, StepRequest, predict_step
    from launch.local_worlds import meetings

    condition, worlds = Condition(cast(Modality | None, modality)), meetings()

    def outcomes(given: str) -> ClipOutcomes:
        if is_predictions_file(given):
            return outcomes_of_file(given)
        return outcomes_of_step(predict_step(StepRequest(given, condition=condition, **clips), next(worlds)))

    first, second = map(outcomes, folders)
    echo_once(json.dumps(paired(first, second, seed=seed), indent=1))
